"""Records read as typed values, and refused in one line that names file and field."""

import json

import pytest

from flatllmbench.runs import Compression, Evaluation, Scoring, Timing, read_runs
from flatllmcore.errors import InputError
from sample_records import COMPRESSION, EVALUATION, SCORING, TIMING, saved


def without(record: dict, *path: str | int) -> dict:
    """Return a copy of a record that lacks the field at ``path``."""
    changed = json.loads(json.dumps(record))
    place = changed
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return changed


def with_value(record: dict, value: object, *path: str | int) -> dict:
    changed = json.loads(json.dumps(record))
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


def refused(path) -> str:
    with pytest.raises(InputError) as error:
        read_runs([path])
    return str(error.value)


def test_every_kind_is_read_from_a_folder_and_what_lies_below_it(tmp_path):
    saved(tmp_path, "a", COMPRESSION)
    saved(tmp_path / "below", "b", SCORING)
    saved(tmp_path / "below" / "deeper", "c", EVALUATION)
    saved(tmp_path / "below" / "deeper", "d", TIMING)
    (tmp_path / "run.log").write_text("not a record")
    kinds = [type(run) for run in read_runs([tmp_path])]
    assert kinds == [Compression, Scoring, Evaluation, Timing]


def test_a_record_named_twice_is_read_once(tmp_path):
    path = saved(tmp_path, "a", COMPRESSION)
    assert len(read_runs([path, tmp_path])) == 1


def test_fields_are_those_of_the_record(tmp_path):
    compression, evaluation, timing = read_runs(
        [saved(tmp_path, "a", COMPRESSION), saved(tmp_path, "b", EVALUATION), saved(tmp_path, "c", TIMING)]
    )
    assert (compression.model, compression.saved_as, compression.sparsity_ratio) == ("tiny", "tiny-20", 20.0)
    assert [layer.keep for layer in compression.layers] == [1.0, 0.6]
    assert compression.calibration_s == 100.0 - 5.0 - 20.0 - 3.0
    assert evaluation.zero_shot.tasks["piqa"].value == 0.7812
    assert evaluation.zero_shot.tasks["mmlu"].stderr is None
    assert timing.cells[0].decode_speedup is None
    assert timing.cells[1].decode_speedup.low == 1.1
    assert [model.is_dense for model in timing.models] == [True, False]


def test_fields_nobody_asked_for_are_let_be(tmp_path):
    (run,) = read_runs([saved(tmp_path, "a", COMPRESSION, attention={"implementation": "sdpa"})])
    assert run.sparsity_ratio == 20.0


@pytest.mark.parametrize(
    ("record", "path", "field"),
    [
        (COMPRESSION, ("kind",), "kind"),
        (COMPRESSION, ("perplexity", "dense"), "perplexity.dense"),
        (COMPRESSION, ("layers", 1, "keep"), "layers[1].keep"),
        (SCORING, ("scores",), "scores"),
        (EVALUATION, ("zero_shot", "tasks", "piqa", "value"), "zero_shot.tasks.piqa.value"),
        (EVALUATION, ("model", "base_model"), "model.base_model"),
        (TIMING, ("models", 1, "parameters", "total"), "models[1].parameters.total"),
        (TIMING, ("cells", 0, "decode_ms_per_token", "median"), "cells[0].decode_ms_per_token.median"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_field_is_named_with_its_file(tmp_path, record, path, field):
    broken = saved(tmp_path, "broken", without(record, *path))
    assert refused(broken) == f"{broken} is not a usable record: the field '{field}' is missing"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("kind",), "other", "the field 'kind' is 'other'; expected one of bi, flatllm, zero_shot, speed"),
        (("kind",), None, "the field 'kind' is None; expected text"),
        (("seed",), True, "the field 'seed' is True; expected a whole number"),
        (("seed",), 1.5, "the field 'seed' is 1.5; expected a whole number"),
        (("elapsed_s",), "1", "the field 'elapsed_s' is '1'; expected a finite number"),
        (("prune_qk",), 0, "the field 'prune_qk' is 0; expected true or false"),
        (("perplexity",), [], "the field 'perplexity' is []; expected an object"),
        (("layers",), {}, "the field 'layers' is {}; expected a list"),
        (("stages_s", "load"), None, "the field 'stages_s.load' is None; expected a finite number"),
    ],
)
def test_a_field_of_another_type_is_named_with_what_it_holds(tmp_path, path, value, expected):
    broken = saved(tmp_path, "broken", with_value(COMPRESSION, value, *path))
    assert refused(broken) == f"{broken} is not a usable record: {expected}"


def test_numbers_that_are_none_are_refused(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(COMPRESSION | {"elapsed_s": float("nan")}))
    assert "'elapsed_s' is nan" in refused(broken)


def test_a_cell_of_a_model_that_is_not_listed_is_refused(tmp_path):
    broken = saved(tmp_path, "broken", with_value(TIMING, 2, "cells", 1, "model"))
    assert refused(broken).endswith("the field 'cells[1].model' is 2 of 2")


@pytest.mark.parametrize(("content", "reason"), [("{", "is not JSON"), ("[]", "holds a JSON list; expected an object")])
def test_what_is_not_a_json_object_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert str(path) in refused(path)
    assert reason in refused(path)


def test_a_path_that_is_not_there_and_a_folder_without_records_are_refused(tmp_path):
    assert refused(tmp_path / "none.json") == f"cannot read {tmp_path / 'none.json'}: No such file or directory"
    assert refused(tmp_path) == f"no records in {tmp_path}: it holds no *.json file"
