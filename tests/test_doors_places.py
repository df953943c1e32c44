"""Whatever lies where a run of main.py writes, it stays, and the run ends well or with one line."""

import io
import os
import tempfile
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as st

import main
from flatllmcore.engine.checkpoint_sink import CheckpointSink
from flatllmcore.utils.checkpoint import MANIFEST, partial_folder, read_manifest
from flatllmcore.utils.files import write_json

KINDS = {
    "file": lambda path: path.write_text(f"precious at {path}"),
    "folder": Path.mkdir,
    "link to a folder": lambda path: path.symlink_to(Path("precious").absolute()),
    "link to a file": lambda path: path.symlink_to(Path("precious/file").absolute()),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "manifest": lambda path: write_json(path, {"request": {}, "files": ["../precious/file", "config.json", "a/b"]}),
    "damaged": lambda path: path.write_text('{"files": 3'),
}
TEMPORARY = ".tmp.0123456789abcdef"
PLACES = ("out", "out.partial", ".out.partial.lock", ".out.replaced", "logs", "scores", "precious")
BELOW = ("", "notes", "README.md", "a", "a/b", ".replaced", MANIFEST, TEMPORARY)
PATHS = st.builds(os.path.join, st.sampled_from(PLACES), st.sampled_from(BELOW))


class QuickRun:
    """Writes a model of no layers as CheckpointRun writes others."""

    def __init__(self, options, _provenance):
        self.options = options

    def prepare(self, configs, _published):
        return [read_manifest(partial_folder(config.save_model), {}) for config in configs]

    @contextmanager
    def output_folder(self, save_model):
        yield save_model

    @contextmanager
    def compressed(self, _target, folder):
        with CheckpointSink(folder, 0, {}, self.options.overwrite).opened() as sink:
            sink.remember("dense_perplexity", 1)
            (sink.partial / "config.json").write_text("{}")
            yield {}, sink


def contents() -> str:
    """Return what all files hold together."""
    return "\n".join(path.read_text() for path in Path().rglob("*") if path.is_file() and not path.is_symlink())


def is_a_runs(path: Path) -> bool:
    """Tell whether a file is named as a run's own, which it may replace."""
    names = {*path.parts}
    return bool(names & {MANIFEST, TEMPORARY, ".replaced"}) or path.name in ("README.md", "config.json", "b")


@given(
    has_model=st.booleans(),
    made=st.lists(st.tuples(PATHS, st.sampled_from(sorted(KINDS))), max_size=4),
    save_model=st.sampled_from(["out", "out/", "precious", ".", "link"]) | PATHS,
    save=st.just("logs") | PATHS,
    bi_score=st.just("scores") | PATHS,
    overwrite=st.booleans(),
)
@example(True, [("out/notes", "file")], "out", "logs", "scores", True)
@example(True, [(".out.replaced/notes", "file")], "out", "logs", "scores", True)
@example(True, [(".out.partial.lock", "file")], "out", "logs", "scores", True)
@example(True, [], "out", "out/a", "scores", True)
@example(True, [], "link", "logs", "scores", True)
def test_what_lies_where_a_run_writes_stays_and_the_run_ends_well_or_in_one_line(
    has_model, made, save_model, save, bi_score, overwrite
):
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        Path("precious").mkdir()
        Path("precious/file").write_text("precious")
        Path("link").symlink_to("out")
        if has_model:
            Path("out").mkdir()
            write_json(Path("out") / MANIFEST, {"request": {}, "files": ["config.json"]})
        for name, kind in made:
            path = Path(name)
            with suppress(OSError):  # of what another one is in the way of
                path.parent.mkdir(parents=True, exist_ok=True)
                if not os.path.lexists(path):
                    KINDS[kind](path)
        kept = [f"precious at {name}" for name, kind in made if f"precious at {name}" in contents()]
        kept = [text for text in kept if not is_a_runs(Path(text.removeprefix("precious at ")))]
        argv = ["--model", "m", "--dataset", "pydocs", "--device", "cpu", "--save_model", save_model, "--save", save]
        argv += ["--bi_score", bi_score, *["--overwrite"] * overwrite]
        said = io.StringIO()
        with (
            mock.patch.multiple(main, CheckpointRun=QuickRun, model_card=lambda *_: "# card\n"),
            redirect_stderr(said),
            redirect_stdout(io.StringIO()),
        ):
            status = main.main(argv)
        assert status in (0, 2)
        assert [line[:7] for line in said.getvalue().splitlines()] == ["error: "] * (status // 2)
        assert all(text in contents() for text in kept)
        assert Path("precious/file").read_text() == "precious"
        if status == 0:
            assert (Path(save_model) / "README.md").read_text() == "# card\n"
