"""What the Evaluation Harness (lm-evaluation-harness 0.4.13) says of a model, item by item.

Importing this imports lm_eval, datasets and transformers: whoever wants them offline sets
HF_HUB_OFFLINE before.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lm_eval
import lm_eval.utils
import torch
import transformers
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import train_gpt as T
from evals import bits, memory
from evals.configuration_nca import NCAConfig

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# `auto` batches: tokens times vocabulary times LOGIT_BYTES, what the harness and a softcap hold of
# a call's logits at once, fill this share of the GPU's memory, as other processes may want the
# rest, and of what this process may hold at most that part.
SHARE, PART, LOGIT_BYTES = 0.2, 0.5, 20
CPU_TOKENS = 4096
WRITING = 12  # times as many tokens fit where only the last position has logits, beside the cache


# ---- Tasks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tasks:
    """Tasks by the names that they were asked for."""

    manager: TaskManager
    loaded: dict[str, Task]

    def names(self) -> list[str]:
        """The harness's own names of them."""
        return [task.task_name for task in self.loaded.values()]


def find_tasks(folder: str, wanted: list[str]) -> Tasks:
    """Tasks of a folder of task files, or, if that is "", of the harness itself. A name may lack
    its end: `piqa` finds `piqa_offline`. InputError where one is missing or cannot be loaded."""
    if folder and not Path(folder).is_dir():
        raise T.InputError(f"--tasks-dir {folder}: there is no such folder")
    for name in ("lm_eval", "transformers", "datasets"):  # they warn of what is meant
        logging.getLogger(name).setLevel(logging.ERROR)
    compile_templates_once()
    manager = TaskManager(include_path=folder or None, include_defaults=not folder)
    where = folder or "the Evaluation Harness"
    names = {name: task_name(manager.all_subtasks, name, where) for name in wanted}
    if len(set(names.values())) < len(names):
        raise T.InputError(f"--tasks {' '.join(wanted)}: two of them are the same task")
    return Tasks(manager, {name: load_task(manager, full) for name, full in names.items()})


def compile_templates_once() -> None:
    """The harness compiles a task's templates anew for every item, which takes longer than asking
    the model does."""
    env = lm_eval.utils.env
    if not hasattr(env.from_string, "cache_info"):
        env.from_string = functools.lru_cache(maxsize=1024)(env.from_string)


def task_name(have: list[str], wanted: str, where: str) -> str:
    if wanted in have:
        return wanted
    found = [name for name in have if name.startswith(f"{wanted}_")]
    if len(found) == 1:
        return found[0]
    if found:
        raise T.InputError(f"{where} has several tasks {wanted!r}: {', '.join(found[:8])}")
    some = ", ".join(have[:12]) or "none"
    raise T.InputError(f"{where} has no task {wanted!r}; it has {some}")


def load_task(manager: TaskManager, name: str) -> Task:
    try:
        return manager.load([name])["tasks"][name]
    except Exception as e:  # of the hub, of datasets, of a task's own code
        said = " ".join(str(e).split())[:300]
        raise T.InputError(
            f"task {name} cannot be loaded ({type(e).__name__}: {said}); --tasks-dir takes a "
            "folder of tasks with their data"
        ) from None


# ---- Models -------------------------------------------------------------------------------------


class LM(HFLM):
    """A Hugging Face folder in the harness; keeps in mind which prompts were cut to fit.

    Batch size `auto` is a number of tokens, not of rows: items are sorted by length, and those of
    HellaSwag are a tenth as long as the longest of BoolQ.
    """

    def __init__(self, folder: Path, **kwargs):
        super().__init__(pretrained=str(folder), add_bos_token=True, **kwargs)
        self.cut: set[tuple[str, str]] = set()
        self.known: dict[str, list[int]] = {}  # tokens of the texts that are being asked
        self.chunk = 0, 0  # first request of the present batch, and its rows
        self.halved = 0  # how often memory was out

    @property
    def call_tokens(self) -> int:
        """Tokens of an `auto` batch."""
        if self.device.type != "cuda":
            return CPU_TOKENS >> self.halved
        total = torch.cuda.get_device_properties(self.device).total_memory
        logits = min(SHARE * total, PART * memory.allowed(self.device))
        return int(logits / LOGIT_BYTES / self.model.config.vocab_size) >> self.halved

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence) -> int:
        """Rows of the batch that request `pos` is in; the harness asks for one after the other, the
        longest first."""
        first, rows = self.chunk
        if pos == 0 or pos >= first + rows:
            _, context, answer = n_reordered_requests[pos]
            longest = min(len(context) + len(answer), self.max_length)
            self.chunk = pos, max(1, self.call_tokens // longest)
        return self.chunk[1]

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        """Rows of an `auto` batch that writes text: none is longer than max_length."""
        self.chunk = 0, max(1, WRITING * self.call_tokens // self.max_length)
        return self.chunk[1]

    def until_it_fits(self, ask: Callable[..., list], *args, **kwargs) -> list:
        """What `ask` says; where the GPU's memory was out, it is asked again with `auto` batches of
        half the tokens. OutOfMemoryError where a batch was one row, or its rows were told."""
        while True:
            try:
                return ask(*args, **kwargs)
            except torch.OutOfMemoryError:
                if self.batch_size != "auto" or self.chunk[1] <= 1:
                    raise
            # Outside of the handler, where the error no longer holds the batch's tensors.
            self.halved += 1
            memory.say_halved()
            memory.release()

    def loglikelihood(self, requests, **kwargs):
        """All texts are tokenized in one go: one by one takes longer than asking the model does."""
        pairs = [request.args for request in requests]
        texts = dict.fromkeys(t for c, a in pairs if c for t in (c.rstrip(), c + a))
        start = self.tokenizer.decode(self.prefix_token_id)
        texts = [text for text in texts if text and not text.startswith(start)]
        if texts:
            found = self.tokenizer(texts, add_special_tokens=self.add_bos_token)["input_ids"]
            self.known = dict(zip(texts, found))
        try:
            return super().loglikelihood(requests, **kwargs)
        finally:
            self.known = {}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs):
        if add_special_tokens is None and string in self.known:
            return self.known[string]
        return super().tok_encode(string, add_special_tokens, **kwargs)

    def _loglikelihood_tokens(self, requests, **kwargs):
        for texts, context, answer in requests:
            if len(answer) > self.max_length:
                raise T.InputError(
                    f"an answer of {len(answer):,} tokens is longer than --max-length "
                    f"{self.max_length}"
                )
            if len(context) + len(answer) > self.max_length + 1:
                self.cut.add(texts)
        return self.until_it_fits(super()._loglikelihood_tokens, requests, **kwargs)

    def generate_until(self, requests, **kwargs):
        return self.until_it_fits(super().generate_until, requests, **kwargs)


def load_model(
    folder: Path, *, device: str, dtype: str, batch_size: str, max_length: int, trust: bool
) -> LM:
    """`dtype`: a key of DTYPES. `max_length`: tokens shown, 0 for `bits.context_of`; learned
    positions may allow fewer. `trust`: run the folder's own code, which ours needs no word for.
    InputError where the folder is not whole."""
    config = checked(folder, trust)
    most = max_length or bits.context_of(config.vocab_size)
    own = getattr(config, "max_position_embeddings", None)
    if own and getattr(config, "family", "gpt2") == "gpt2":  # "speedrun" has no last position
        most = min(most, own)
    try:
        lm = LM(
            folder,
            device=device,
            dtype=DTYPES[dtype],
            batch_size=batch_size,
            max_length=most,
            trust_remote_code=trust or config.model_type == NCAConfig.model_type,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        said = " ".join(str(e).split())[:300]
        raise T.InputError(f"{folder} cannot be loaded ({type(e).__name__}: {said})") from None
    if len(lm.tokenizer) > config.vocab_size:
        raise T.InputError(
            f"{folder}: its tokenizer has {len(lm.tokenizer):,} tokens, its model "
            f"{config.vocab_size:,}"
        )
    if lm.tok_encode("a")[0] != lm.prefix_token_id:
        raise T.InputError(f"{folder}: its tokenizer does not open a text with its start token")
    return lm


def checked(folder: Path, trust: bool) -> transformers.PreTrainedConfig:
    """The folder's configuration; InputError where something is missing, or code is not trusted."""
    try:
        said = json.loads((folder / "config.json").read_text())
        kind = said["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise T.InputError(f"{folder}/config.json is damaged: {e!r}") from None
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise T.InputError(f"{folder} has no tokenizer: {', '.join(TOKENIZER_FILES)} are missing")
    ours = kind == NCAConfig.model_type
    if "auto_map" in said and not (ours or trust):
        raise T.InputError(f"{folder} has code of its own: --trust-remote-code runs it")
    if ours:
        return NCAConfig.from_pretrained(folder)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError) as e:
        said = " ".join(str(e).split())[:300]
        raise T.InputError(f"{folder} cannot be loaded: {said}") from None


def facts(lm: LM, folder: Path) -> dict:
    """What identifies the weights and the way they were run, for the file of results."""
    weights = hashlib.sha256()
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        weights.update(T.sha256(path).encode())
    device = lm.device
    return {
        "weights_sha256": weights.hexdigest(),
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "vocab": lm.model.config.vocab_size,
        "architecture": type(lm.model).__name__,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "max_length": lm.max_length,
        "batch_size": lm.batch_size,
        "lm_eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


# ---- Results ------------------------------------------------------------------------------------


def evaluate(lm: LM, tasks: Tasks, shots: int, bos: bool, limit: int) -> list[dict]:
    """One dict for each task: its metrics, and what they are made of, item by item. `bos`: every
    prompt behind the start token. `limit`: the first items alone; 0 for all."""
    lm.add_bos_token, lm.cut = bos, set()
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks.names(),
        task_manager=tasks.manager,
        num_fewshot=shots,
        limit=limit or None,
        bootstrap_iters=0,  # errors come from the items
        log_samples=True,
    )
    return [
        {"task": name, "shots": shots, "bos": bos, **result(found, task, lm.cut)}
        for name, task in tasks.loaded.items()
    ]


def result(found: dict, task: Task, cut: set[tuple[str, str]]) -> dict:
    """One task of what simple_evaluate returns. Lists are by item, in the order of the data."""
    name, samples = task.task_name, found["samples"][task.task_name]
    filtered = samples[0]["filter"]  # answers may be read in several ways: the first
    samples = sorted((s for s in samples if s["filter"] == filtered), key=lambda s: s["doc_id"])
    metrics, values = {}, {}
    for metric in samples[0]["metrics"]:
        metrics[metric] = float(found["results"][name][f"{metric},{filtered}"])
        each = [s[metric] for s in samples]
        if all(isinstance(v, (int, float)) for v in each):
            values[metric] = [round(float(v), 6) for v in each]
    out = {
        "harness_task": name,
        "version": found["versions"].get(name),
        "items": len(samples),
        "of": found["n-samples"][name]["original"],
        "cut": sum(any(tuple(a) in cut for a in asked(s)) for s in samples),
        "metrics": metrics,
        "values": values,
        "keys": [key(s) for s in samples],
    }
    if task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
        out |= answers(task, samples, values)
    else:
        out["texts"] = [s["resps"][0] for s in samples]
    return out


def asked(sample: dict) -> list[tuple]:
    """The (context, answer) pairs whose log-likelihoods were wanted."""
    return [tuple(a) for a in sample["arguments"] if isinstance(a[1], str)]


def key(sample: dict) -> str:
    """The same for the same prompts and answers, to the letter: what pairing rests on."""
    text = json.dumps(sample["arguments"], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answers(task: Task, samples: list[dict], values: dict[str, list]) -> dict:
    """Log-likelihoods of the options (nats), which one is right, and what guessing would score.
    Adds the right answer's bits a byte to `values`, where every item has one right answer."""
    nats = [[round(float(r[0]), 6) for r in s["filtered_resps"]] for s in samples]
    right = [right_option(task, s["doc"]) for s in samples]
    out = {"log_likelihoods": nats, "right": right, "chance": None, "constant": None}
    if None not in right:
        sizes = [bits.scored_bytes(*asked(s)[i]) for s, i in zip(samples, right)]
        chosen = [row[i] for row, i in zip(nats, right)]
        values["bits_a_byte"] = bits.bits_a_byte(chosen, sizes).round(6).tolist()
        out["bytes"] = sizes
    if task.OUTPUT_TYPE == "multiple_choice":
        out["chance"] = sum(1 / len(row) for row in nats) / len(nats)
        options = {tuple(answer for _, answer in asked(s)) for s in samples}
        if len(options) == 1 and not task.multiple_input:  # the same in every item: yes, no
            out["constant"] = max(Counter(right).values()) / len(right)
    return out


def right_option(task: Task, doc: dict) -> int | None:
    """The right answer's place among the options; None where there are several."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(right, str):
        options = task.doc_to_choice(doc)
        right = options.index(right) if right in options else None
    return right if isinstance(right, int) else None
