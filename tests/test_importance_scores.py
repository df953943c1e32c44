"""Files of importance scores: ours round-trip, the authors' are read without being trusted."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flatllmcore.core.importance import ImportanceScores, read_author_keep_ratios, read_author_scores
from flatllmcore.errors import InputError
from flatllmcore.utils.dimensions import ModelDimensions
from flatllmcore.utils.files import read_json, to_json_bytes, write_json

DIMENSIONS = ModelDimensions("llama", 3, 64, 8, 4, 8, 172)
NUMBERS = [0.75, 0.5, 0.125]  # exact in every binary format


@pytest.fixture
def scores() -> ImportanceScores:
    return ImportanceScores(
        model_id="some/model",
        fingerprint="0123abcd",
        dimensions=DIMENSIONS,
        dataset="pydocs",
        nsamples=8,
        seqlen=128,
        seed=42,
        scores=(0.1 + 0.2, 1 / 3, 0.0),
        zero_rows=2,
        versions={"torch": "2.6.0"},
    )


def read_json_scores(path: Path) -> ImportanceScores:
    return read_json(path, ImportanceScores)


class TestOurFile:
    def test_saved_scores_come_back_equal_to_the_last_bit(self, scores, tmp_path):
        write_json(tmp_path / "new" / "importance.json", scores)
        assert read_json_scores(tmp_path / "new" / "importance.json") == scores

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"scores": [0.1, 0.2]}, "'scores' has 2 entries; the model has 3 layers"),
            ({"scores": [0.1, 0.2, float("inf")]}, "is not JSON"),
            ({"scores": [0.1, -0.2, 0.3]}, "'scores': the value of layer 1 is -0.2"),
            ({"scores": [0.1, "0.2", 0.3]}, r"Expected `float`, got `str` - at `\$\.scores\[1\]`"),
            ({"model_id": 7}, r"Expected `str`, got `int` - at `\$\.model_id`"),
            ({"dimensions": asdict(DIMENSIONS) | {"head_dim": 0}}, "head_dim is 0; accepted: 1 or more"),
        ],
    )
    def test_a_damaged_field_is_refused_by_file_and_name(self, scores, tmp_path, change, complaint):
        path = tmp_path / "importance.json"
        path.write_text(json.dumps(json.loads(to_json_bytes(scores)) | change))
        with pytest.raises(InputError, match=complaint) as caught:
            read_json_scores(path)
        assert str(caught.value).startswith(f"{path}: ")

    @pytest.mark.parametrize("name", ["model_id", "fingerprint", "dimensions", "scores", "seed"])
    def test_a_missing_field_is_named(self, scores, tmp_path, name):
        content = json.loads(to_json_bytes(scores))
        del content[name]
        (tmp_path / "importance.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"missing required field `{name}`"):
            read_json_scores(tmp_path / "importance.json")

    def test_the_scored_model_matches_with_and_without_its_weights(self, scores):
        scores.check_matches(DIMENSIONS, "0123abcd")
        scores.check_matches(DIMENSIONS, None)

    def test_another_model_is_refused_with_the_sizes_that_differ(self, scores):
        other = replace(DIMENSIONS, num_layers=4, head_dim=16)
        with pytest.raises(InputError, match=r"some/model: num_layers 3, not 4; head_dim 8, not 16$"):
            scores.check_matches(other, None)

    def test_other_weights_of_the_same_sizes_are_refused(self, scores):
        with pytest.raises(InputError, match="fingerprint 0123abcd, not ffff"):
            scores.check_matches(DIMENSIONS, "ffff")


def save(content: object, folder: Path) -> Path:
    torch.save(content, folder / "bi_score.pt")
    return folder / "bi_score.pt"


def save_as_numpy_1(content: object, folder: Path) -> Path:
    """Save with the module names that the other major version of NumPy writes, in torch's older file format."""
    path = folder / "bi_score.pt"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    written, other = b"numpy._core.multiarray", b"numpy.core.multiarray"
    if written not in path.read_bytes():
        written, other = other, written
    renamed = path.read_bytes().replace(b"c" + written + b"\n", b"c" + other + b"\n")
    assert other in renamed
    path.write_bytes(renamed)
    return path


class TestAuthorsFiles:
    @pytest.mark.parametrize(
        "content",
        [
            NUMBERS,
            [np.float64(x) for x in NUMBERS],
            [np.float32(x) for x in NUMBERS],
            np.array(NUMBERS),
            np.array(NUMBERS, dtype=np.float32),
            np.array(NUMBERS, dtype=np.float16),
            torch.tensor(NUMBERS),
            torch.tensor(NUMBERS, dtype=torch.bfloat16),
            [torch.tensor(x) for x in NUMBERS],
        ],
        ids=["floats", "float64s", "float32s", "array", "array32", "array16", "tensor", "bfloat16", "tensors"],
    )
    def test_every_format_in_the_wild_gives_plain_floats(self, content, tmp_path):
        for read in (read_author_scores, read_author_keep_ratios):
            numbers = read(save(content, tmp_path))
            assert numbers == NUMBERS
            assert {type(x) for x in numbers} == {float}

    @pytest.mark.parametrize("content", [np.array(NUMBERS), [np.float64(x) for x in NUMBERS]], ids=["array", "scalars"])
    def test_files_of_the_other_numpy_version_are_read(self, content, tmp_path):
        assert read_author_scores(save_as_numpy_1(content, tmp_path)) == NUMBERS

    @pytest.mark.parametrize("is_torch_file", [True, False], ids=["torch.save", "pickle"])
    def test_a_malicious_pickle_is_refused_and_not_executed(self, tmp_path, is_torch_file):
        bomb, proof = Bomb(tmp_path / "executed"), tmp_path / "executed"
        path = tmp_path / "bi_score.pt"
        if is_torch_file:
            torch.save([bomb], path)
        else:
            path.write_bytes(pickle.dumps([bomb], protocol=2))
        with pytest.raises(InputError, match="cannot read") as caught:
            read_author_scores(path)
        assert "\n" not in str(caught.value)
        assert not proof.exists()
        torch.load(path, weights_only=False) if is_torch_file else pickle.loads(path.read_bytes())
        assert proof.exists()  # the file was dangerous indeed

    @pytest.mark.parametrize("length", [0, 1, 20, 200, 500])
    def test_a_truncated_file_is_refused(self, tmp_path, length):
        path = save(NUMBERS, tmp_path)
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(InputError, match="cannot read"):
            read_author_scores(path)

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"cannot read .*none\.pt"):
            read_author_scores(tmp_path / "none.pt")

    @pytest.mark.parametrize(
        "content",
        [
            {"scores": NUMBERS},
            "0.5",
            0.5,
            [],
            torch.tensor(0.5),
            torch.zeros(2, 2),
            [[0.5], [0.5]],
            ["0.5"],
            [None],
            [True],
            torch.tensor([0.5 + 1j]),
        ],
        ids=str,
    )
    def test_anything_but_a_row_of_numbers_is_refused(self, content, tmp_path):
        with pytest.raises(InputError, match="of one number per layer"):
            read_author_scores(save(content, tmp_path))

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -0.1])
    def test_a_number_that_is_no_score_is_refused_with_its_layer(self, number, tmp_path):
        with pytest.raises(InputError, match=r"layer 1 is .*at least 0"):
            read_author_scores(save([0.5, number], tmp_path))

    @pytest.mark.parametrize(("share", "complaint"), [(1.01, "keeps 1.01 of layer 1"), (0.0, "keeps 0.0 of layer 1")])
    def test_a_share_outside_zero_to_one_is_refused(self, share, complaint, tmp_path):
        with pytest.raises(InputError, match=complaint):
            read_author_keep_ratios(save([0.5, share], tmp_path))

    def test_a_share_above_one_by_rounding_is_one(self, tmp_path):
        assert read_author_keep_ratios(save([1 + 1e-7, 0.5], tmp_path)) == [1.0, 0.5]


class Bomb:
    """Unpickles by creating a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), "w")
