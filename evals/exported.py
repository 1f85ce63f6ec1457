"""A folder of evals/export.py as the trainer's model again, for what needs more than logits: to see
where its heads look, to fine-tune it.

An export renames, joins, splits and turns parameters and drops rows that pad a vocabulary, but
changes no number except by its dtype. So it is undone without a second list of names: a model whose
every number is its own place goes the same way, and says what came from where. `trainer.npz` in the
folder has the checkpoint's meta and what was dropped, which the loss of training counts.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import train_gpt as T

FILE = "trainer.npz"
OF_THE_MACHINE = ("data", "out", "run_id", "resume")  # settings that mean nothing elsewhere


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a Hugging Face folder, ours or another's."""
    return (Path(path) / "config.json").is_file()


def model_class(meta: dict) -> type[T.GPT]:
    """What a checkpoint with this `meta` holds: train_gpt.py's model, or variants/gpt2.py's."""
    if meta["config"]["preset"] != "gpt2":
        return T.GPT
    from variants import gpt2

    return gpt2.GPT2


def meta_of(folder: str | Path) -> dict:
    """meta.json of the checkpoint that the folder was exported from; InputError where it is none
    of ours."""
    return _read(Path(folder))[0]


def _read(folder: Path) -> tuple[dict, np.ndarray]:
    """(meta, what was dropped)."""
    if not (folder / FILE).is_file():
        raise T.InputError(
            f"{folder} is a Hugging Face folder without {FILE}: give one that this version's "
            "./run.sh export made, or the run"
        )
    try:
        with np.load(folder / FILE, allow_pickle=False) as file:
            meta, dropped = json.loads(str(file["meta"])), file["dropped"]
        meta["config"], meta["window"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise T.InputError(f"{folder / FILE} is damaged: {e!r}") from None
    return meta, dropped


def _places(model: nn.Module, meta: dict) -> dict[str, torch.Tensor]:
    """{name in the folder: for each of its numbers the place among all numbers of the model's
    parameters, one parameter after the other}. The model's own numbers are lost."""
    from evals import export

    at = 0
    for p in model.parameters():
        p.requires_grad_(False)
        p.data = torch.arange(at, at + p.numel(), dtype=torch.float64).view(p.shape)  # exact
        at += p.numel()
    buffers = {buffer.data_ptr() for buffer in model.buffers() if buffer.numel()}
    state = export.state_of(model, meta)
    return {k: v.flatten().long() for k, v in state.items() if v.data_ptr() not in buffers}


def _model(meta: dict, source: Path, length: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    make = model_class(meta)
    return make(T.config_from_flat(meta["config"], source).model, length, dtype)


def write(folder: Path, model: nn.Module, meta: dict, length: int) -> None:
    """Puts `trainer.npz` into a folder that holds `model`, of a checkpoint with this `meta`."""
    numbers = torch.cat([p.detach().flatten().float() for p in model.parameters()])
    dropped = torch.ones(numbers.numel(), dtype=torch.bool)
    for places in _places(_model(meta, folder, length), meta).values():
        dropped[places] = False
    defaults = T.Config().flat()
    config = {**meta["config"], **{name: defaults[name] for name in OF_THE_MACHINE}}
    said = json.dumps({**meta, "config": config})
    np.savez_compressed(folder / FILE, meta=np.array(said), dropped=numbers[dropped].numpy())


@torch.no_grad()
def load(folder: str | Path, device: str, length: int) -> tuple[nn.Module, dict]:
    """(model, meta) as `train_gpt.load_model` gives them for the checkpoint, but that the weights
    have the folder's precision. InputError where the folder is none of ours, or damaged."""
    folder = Path(folder)
    meta, dropped = _read(folder)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from evals import export  # which takes transformers
    except ImportError as e:
        said = f"{folder} is a Hugging Face folder, which takes {e.name}: pip install {e.name}"
        raise T.InputError(said) from None
    places = _places(_model(meta, folder, length), meta)
    model = _model(meta, folder, length, torch.bfloat16 if device == "cuda" else torch.float32)
    numbers = torch.zeros(sum(p.numel() for p in model.parameters()))
    missing = torch.ones(numbers.numel(), dtype=torch.bool)
    try:
        for path in sorted(folder.glob("*.safetensors")):
            for name, value in load_file(path).items():
                if name in places:  # not a buffer
                    numbers[places[name]] = value.flatten().float()
                    missing[places[name]] = False
                elif name == export.TABLE and model.cfg.ngram:
                    model.ngram.table = value.view(model.ngram.rows, model.ngram.dim)
        if model.cfg.ngram and model.ngram.table is None:
            raise RuntimeError(f"{export.TABLE} is not there")
        numbers[missing] = torch.from_numpy(dropped)
    except (OSError, SafetensorError, RuntimeError, TypeError) as e:
        said = str(e).splitlines()[0]
        raise T.InputError(f"{folder} does not fit its own {FILE}: {said}") from None
    for p, own in zip(model.parameters(), numbers.split([p.numel() for p in model.parameters()])):
        p.copy_(own.view(p.shape))
    return model.to(device).eval(), meta
