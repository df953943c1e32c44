"""Settings, models and fixtures of all tests. Libraries are imported where they are used: not all processes do."""

from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = str(ROOT / "models" / "pydocs-llama")
# No deadlines: how long an example takes on a busy machine is no property. The short profile has the same examples in
# every run; --hypothesis-profile=long looks further.
settings.register_profile("short", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=2000)
settings.load_profile("short")


def shape(*sizes: int) -> dict[str, int]:
    names = ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    return dict(zip(names, sizes, strict=True))


def tiny_model(family: str = "llama", seed: int = 0, **overrides):
    """A random model of two layers in float64, with grouped heads and a head width that is not hidden / heads."""
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    torch.manual_seed(seed)
    sizes = shape(4, 2, 32, 56) | {"num_hidden_layers": 2, "head_dim": 12, "vocab_size": 97}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 0.3} | overrides
    if family == "mistral":
        sizes.setdefault("sliding_window", None)
    config = CONFIG_MAPPING[family](**sizes)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:  # initialised to constants, which would hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random(*sizes: int, seed: int = 0):
    import torch

    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same_weights(found, expected):
    """Compare state dicts bit by bit."""
    import torch

    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def one_line(capsys, program, argv) -> str:
    """Run a program that refuses what it is asked, check its status and that it says one line; return the line."""
    capsys.readouterr()
    assert program(argv) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    assert line.startswith("error: ")
    return line


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        import torch

        names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        metafunc.parametrize("device", [torch.device(name) for name in names], ids=names)


def pytest_terminal_summary(terminalreporter):
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    if not any("cuda" in getattr(report, "nodeid", "") for report in reports):
        terminalreporter.write_line("on the CPU alone: no test was run on a GPU")


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def windows():
    import torch

    return torch.randint(97, (24, 16), generator=torch.Generator().manual_seed(1))
