"""Published figures that ours stand beside, with where they come from; nothing here was measured by this package."""

from dataclasses import dataclass
from typing import NamedTuple

PAPER = "Tian et al., arXiv 2505.23966"
PERCENT_REMOVED = 20
SEQLEN = 4096
DATASET = "wikitext2"
ACCURACY = "mean of MMLU (5-shot) and PIQA, WinoGrande, HellaSwag, ARC-e, ARC-c, OpenBookQA (0-shot)"


@dataclass(frozen=True)
class PublishedModel:
    """A column of Table 1, and the script that fills it here."""

    name: str
    hub_id: str
    script: str

    @property
    def folder(self) -> str:
        """What the last part of its hub id, or the folder of its weights, is called."""
        return self.hub_id.split("/")[1]


class Figures(NamedTuple):
    perplexity: float
    accuracy: float


LLAMA_2_7B = PublishedModel("Llama-2 7B", "meta-llama/Llama-2-7b-hf", "scripts/llama_7b.sh")
LLAMA_2_13B = PublishedModel("Llama-2 13B", "meta-llama/Llama-2-13b-hf", "scripts/llama_13b.sh")
LLAMA_2_70B = PublishedModel("Llama-2 70B", "meta-llama/Llama-2-70b-hf", "scripts/llama_70b.sh")
MISTRAL_7B = PublishedModel("Mistral-7B v0.1", "mistralai/Mistral-7B-v0.1", "scripts/mistral.sh")
LLAMA_3_8B = PublishedModel("Llama-3 8B", "meta-llama/Meta-Llama-3-8B", "scripts/llama_3_8b.sh")
MODELS = (LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, MISTRAL_7B, LLAMA_3_8B)

# WikiText-2 perplexity at length 4096 and mean accuracy in percent, 20 % removed, in the order of MODELS.
DENSE, FLAT_LLM = "dense", "FLAT-LLM"
TABLE_1: dict[str, tuple[tuple[float, float] | None, ...]] = {
    DENSE: ((5.11, 62.14), (4.57, 65.70), (3.12, 71.38), (4.92, 68.14), (5.75, 68.14)),
    "LLM-Pruner": ((10.55, 53.89), (9.67, 55.45), None, None, None),
    "FLAP": ((6.76, 53.07), (5.90, 57.00), (8.76, 48.29), (7.11, 48.29), (8.42, 54.42)),
    "SliceGPT": ((8.24, 46.26), (7.10, 50.58), (5.76, 57.40), (9.06, 43.18), (16.62, 41.28)),
    "SVD-LLM": ((7.84, 52.32), (7.37, 55.86), (5.96, 61.07), (9.29, 50.23), (17.17, 47.06)),
    FLAT_LLM: ((6.70, 55.16), (5.55, 63.00), (4.33, 67.98), (6.11, 58.54), (8.15, 61.47)),
}

# Minutes of calibration for Llama-2 13B at 20 % on one A100.
CALIBRATION_MODEL = LLAMA_2_13B
CALIBRATION_MIN = {FLAT_LLM: 15, "SliceGPT": 35, "SVD-LLM": 27, "FLAP": 10}

# Speed-up of decoding, Llama-2 7B, by percent removed, under SliceGPT's protocol.
SPEED_MODEL = LLAMA_2_7B
SPEED_BATCH, SPEED_LENGTH = 128, 256
DECODE_SPEEDUP = {10: 1.04, 20: 1.10, 30: 1.11, 40: 1.17, 50: 1.23}
READ_OFF_A_PLOT = (20, 30, 40)
MEMORY_SAVED_PERCENT = 32.8  # at best

# WikiText-2 perplexity at length 4096 by percent removed, of MoDeGPT, which calibrates for 4 to 8 hours.
MODEGPT_PAPER = "Lin et al., arXiv 2408.09632"
MODEGPT = {
    LLAMA_2_7B: {10: 5.48, 20: 6.16, 30: 7.51, 40: 8.41, 50: 11.88},
    LLAMA_2_13B: {10: 4.83, 20: 5.29, 30: 6.10, 40: 6.95, 50: 8.95},
}


def figures(method: str, model: PublishedModel) -> Figures | None:
    """Return what Table 1 has for a method and a model, or None for its empty cells."""
    found = TABLE_1[method][MODELS.index(model)]
    return found and Figures(*found)
