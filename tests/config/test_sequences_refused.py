"""What context parallelism and packed sequences cannot be combined with is refused before anything starts."""

from __future__ import annotations

import entry
from training import SCMOE, STOCK_SHARED_EXPERT, with_flags, without_flag

CP2, PACKED = "--context-parallel-size 2", "--dataloader-inter-document-masking"
CHATS = "--sft --tokenizer-type SFTTokenizer --tokenizer-model nowhere"
REFUSED = {
    # flags -> words that the line must hold
    f"{CP2} {PACKED}": ["documents are not cut", f"{PACKED} is set and --context-parallel-size is 2", "use 1"],
    f"{CP2} {CHATS}": ["documents are not cut", "--sft is set and --context-parallel-size is 2"],
    f"{PACKED} --tensor-model-parallel-size 2 --sequence-parallel": ["is 2 and --tensor-model", "--micro-batch-size 1"],
    f"{PACKED} --pipeline-model-parallel-size 2": ["is 2 and --pipeline-model-parallel-size", "--micro-batch-size 1"],
    f"{PACKED} --pipeline-model-parallel-size 2 --micro-batch-size 1 --eval-micro-batch-size 4": ["is 4 and --pipe"],
    f"{PACKED} --reset-attention-mask": ["it does so anyway", "drop --reset-attention-mask"],
    f"{PACKED} --reset-position-ids": ["it does so anyway", "drop --reset-position-ids"],
    f"{PACKED} --window-size (4,0)": ["the mask of a window", "sequences are packed", "drop --window-size"],
    f"{CP2} --window-size (4,0)": ["the mask of a window", "--context-parallel-size is 2", "drop --window-size"],
    f"{CP2} --cp-comm-type a2a": ["gathers keys and values", "--cp-comm-type is a2a", "use --cp-comm-type allgather"],
    f"{CP2} --hybrid-layer-pattern M-*E": ["Mamba layers have not run on parts of sequences", "M-*E"],
    f"{PACKED} --hybrid-layer-pattern M-*E": ["Mamba layers have not run with packed sequences", f"drop {PACKED}"],
    "--sft": ["need a tokenizer with a template", "--tokenizer-type is NullTokenizer", "SFTTokenizer"],
    CHATS: ["chats are read from files", "drop --mock-data"],
    f"{CHATS} {PACKED}": ["--sft and", "set; drop"],
    "--sft-tokenizer-prompt-format default": ["no effect", "--tokenizer-type SFTTokenizer is not given"],
}


def changes(flags: str) -> list[str]:
    return ["--" + change for change in flags.removeprefix("--").split(" --")]


def test_refused():
    entry.assert_refused((with_flags(SCMOE, *changes(flags)), words) for flags, words in REFUSED.items())


def test_a_softmax_that_reads_no_mask_is_refused():
    fused = with_flags(without_flag(SCMOE, "--no-masked-softmax-fusion"), "--bf16")
    words = ["Core's fused softmax reads no mask", "add --no-masked-softmax-fusion"]
    entry.assert_refused((with_flags(fused, flag), words) for flag in (CP2, PACKED))


def test_a_mask_for_chats_is_refused():
    flags = with_flags(without_flag(SCMOE, "--no-create-attention-mask-in-dataloader"), *changes(CHATS))
    entry.assert_refused([(flags, ["make no mask", "--no-create-attention-mask-in-dataloader is not; add it"])])


def test_accepted():
    """Negative control: next to what is refused lies what works."""
    masked = without_flag(SCMOE, "--no-create-attention-mask-in-dataloader")
    entry.assert_accepted([with_flags(base, PACKED) for base in (SCMOE, STOCK_SHARED_EXPERT, masked)])
    one_queue = entry.world(2) | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    cut = with_flags(SCMOE, CP2)
    entry.assert_accepted([cut, with_flags(cut, "--cp-comm-type allgather")], one_queue)
