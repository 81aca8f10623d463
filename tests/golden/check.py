"""Compare the project with vectors of the published implementation.

    python tests/golden/check.py DIR

prints, for every vector file in DIR, the worst relative norm error over its tensors and exits 1 above 2e-4. Files of
`loss_*_worldW.rankR` run as W real processes over gloo. A file nothing here knows is listed as "not covered".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import Tensor

from itemizedclip.evaluation.ranks import retrieval_metrics
from itemizedclip.models.factory import create_model
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.models.weights import load_weights
from itemizedclip.objectives.loss import LossInputs, ObjectiveOptions, itemized_losses
from itemizedclip.runtime.processes import leave_process_group

TOLERANCE = 2e-4
Errors = dict[str, float]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a vector file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖, infinite for a wrong shape or a NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.detach().double(), theirs.double()
    error = ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()
    return error if error == error else float("inf")


def objective_options(config: dict) -> ObjectiveOptions:
    return ObjectiveOptions(
        ila_weight=config["ila_weight"] or 0.0,
        ila_keep_rate=config["ila_keep_rate"],
        kta_weight=config["kta_weight"] or 0.0,
        key_token_fraction=config["key_token_fraction"] or 1.0,
        mps_weight=config["mps_weight"] or 0.0,
        iis_weight=config["iis_weight"] or 0.0,
        worst_positive_factor=config["worst_positive_factor"],
        normal_check=config["normal_check"],
    )


def loss_errors(tensors: dict[str, Tensor], head_tensors: dict[str, Tensor], config: dict) -> Errors:
    """Run one rank's loss and gradients."""
    head = ItemAttention(config["D"], config["heads"])
    head.load_state_dict({k.removeprefix("head."): v for k, v in head_tensors.items() if k.startswith("head.")})
    leaves = {
        name: tensors[f"in.{name}"].clone().requires_grad_()
        for name in ("image_features", "image_tokens", "text_features")
    }
    scale = torch.tensor(config["logit_scale"], requires_grad=True)
    bias = torch.tensor(config["logit_bias"], requires_grad=True)
    inputs = LossInputs(
        leaves["image_features"],
        leaves["image_tokens"],
        leaves["text_features"],
        tensors["in.item_mask"].bool(),
        tensors["in.is_normal"].bool(),
    )
    losses = itemized_losses(
        head,
        inputs,
        scale,
        bias,
        objective_options(config),
        index_BT=tensors["in.text_index"],
        keep_mask_BHTL=tensors.get("in.keep_mask"),
    )
    losses["loss"].backward()
    names = {"total": "loss", "ila_loss": "ila", "kta_loss": "kta", "mps_loss": "mps", "iis_loss": "iis"}
    ours = {f"out.{theirs}": losses[name] for theirs, name in names.items() if name in losses}
    ours |= {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
    ours |= {"grad.logit_scale": scale.grad, "grad.logit_bias": bias.grad}
    ours |= {f"grad.head.{name}": p.grad for name, p in head.named_parameters()}
    wanted = [name for name in tensors if name.startswith(("out.", "grad."))]
    return {
        name: float("inf") if ours.get(name) is None else relative_error(ours[name], tensors[name]) for name in wanted
    }


def check_loss(path: Path) -> Errors:
    tensors, metadata = read(path)
    return loss_errors(tensors, tensors, json.loads(metadata["config"]))


def _run_rank(rank: int, stem: str, world_size: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    tensors, metadata = read(Path(f"{stem}.rank{rank}.safetensors"))
    head_tensors, _ = read(Path(f"{stem}.rank0.safetensors"))
    errors = loss_errors(tensors, head_tensors, json.loads(metadata["config"]))
    Path(results, f"{rank}.json").write_text(json.dumps(errors))
    leave_process_group()


def check_world(path: Path) -> Errors:
    """All ranks of a multi-rank case, as real processes; called for rank 0's file."""
    stem = str(path).removesuffix(".rank0.safetensors")
    world_size = int(re.search(r"_world(\d+)$", stem).group(1))  # type: ignore[union-attr]
    missing = [r for r in range(world_size) if not Path(f"{stem}.rank{r}.safetensors").is_file()]
    if missing:
        raise FileNotFoundError(f"{stem}: vectors of ranks {missing} are missing")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (stem, world_size, f"{folder}/rendezvous", folder), nprocs=world_size)
        return {
            f"rank{rank} {name}": error
            for rank in range(world_size)
            for name, error in json.loads(Path(folder, f"{rank}.json").read_text()).items()
        }


def check_model_2d(path: Path) -> Errors:
    tensors, metadata = read(path)
    model = create_model(json.loads(metadata["config"])).eval()
    state = {k.removeprefix("state."): v.float() for k, v in tensors.items() if k.startswith("state.")}
    load_weights(model, state, source=str(path))
    with torch.no_grad():
        features = model.encode_image(tensors["in.image"])
        text = model.encode_text(tensors["in.text"])
        items = text[None].expand(len(features.tokens_BLD), -1, -1)
        projected = model.head.project(features.tokens_BLD)
        pooled = model.head.attend(items, projected)
        maps = model.head.attention_weights(items, projected)
    weights = torch.cat([maps.tokens, maps.nowhere[..., None]], dim=-1).mean(1)
    ours = {
        "image_features": features.global_BD,
        "image_tokens": features.tokens_BLD,
        "text_features": text,
        "pooled": pooled,
        "tcsim": torch.cosine_similarity(items, pooled, dim=-1),
        "attention_mean": weights,
        "logit_scale": model.logit_scale.exp(),
        "logit_bias": model.logit_bias,
    }
    return {k: relative_error(ours[k.removeprefix("out.")], v) for k, v in tensors.items() if k.startswith("out.")}


def check_retrieval(path: Path) -> Errors:
    tensors, metadata = read(path)
    ours = retrieval_metrics(tensors["in.scores"], tensors["in.owner"])
    expected = json.loads(metadata["expected"])
    return {k: relative_error(torch.tensor(ours.get(k, float("nan"))), torch.tensor(v)) for k, v in expected.items()}


def check_hlip(path: Path) -> Errors:
    """A trunk with or without series names; its config lists the blocks of each scope."""
    from itemizedclip_radiology.models.hlip import HLIP, HLIPConfig
    from itemizedclip_radiology.models.series_names import encode_series_name

    tensors, metadata = read(path)
    config = json.loads(metadata["config"])
    scopes = ["series"] * config["depth"]
    for key, scope in (("study_attn_indexes", "study"), ("slice_attn_indexes", "slice")):
        for block in config.get(key, ()):
            scopes[block] = scope
    names = tensors.get("in.series_names")
    trunk = HLIP(
        HLIPConfig(
            volume_size=config["img_size"],
            patch_size=config["patch_size"],
            block_scopes=tuple(scopes),
            width=config["embed_dim"],
            num_heads=config["num_heads"],
            series_names=names is not None,
        )
    ).eval()
    trunk.load_state_dict({k.removeprefix("state."): v.float() for k, v in tensors.items() if k.startswith("state.")})
    errors: Errors = {}
    with torch.no_grad():
        errors["out.tokens"] = relative_error(trunk(tensors["in.image"], names).tokens, tensors["out.tokens"])
        if names is not None:
            vectors = trunk.serienameencoder(names).flatten(0, 1)
            errors["out.series_name_embedding"] = relative_error(vectors, tensors["out.series_name_embedding"])
            ours = torch.stack([torch.stack([encode_series_name(n) for n in row]) for row in config["series_names"]])
            errors["in.series_names"] = relative_error(ours, names)
    return errors


CHECKS: list[tuple[str, Callable[[Path], Errors]]] = [
    (r"loss_.*_world\d+\.rank0\.safetensors", check_world),
    (r"loss_(?!.*_world\d).*\.safetensors", check_loss),
    (r"model_2d.*\.safetensors", check_model_2d),
    (r"model_hlip.*\.safetensors", check_hlip),
    (r"retrieval.*\.safetensors", check_retrieval),
]


def check_folder(folder: Path) -> tuple[dict[str, float], list[str]]:
    """Worst error per vector file, and the files no check covers."""
    worst: dict[str, float] = {}
    not_covered: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        if re.fullmatch(r"loss_.*_world\d+\.rank[1-9]\d*\.safetensors", path.name):
            continue  # checked together with rank 0's file
        check = next((check for pattern, check in CHECKS if re.fullmatch(pattern, path.name)), None)
        if check is None:
            not_covered.append(path.name)
            continue
        try:
            errors = check(path)
        except ModuleNotFoundError as error:
            not_covered.append(f"{path.name}  (needs {error.name}: pip install -e '.[radiology]')")
            continue
        name = max(errors, key=errors.__getitem__)
        worst[f"{path.name}  ({len(errors)} tensors, worst: {name})"] = errors[name]
    return worst, not_covered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with *.safetensors vectors")
    folder = parser.parse_args().folder
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        print(f"{folder}: no *.safetensors vectors there; give the folder that holds them", file=sys.stderr)
        return 2
    worst, not_covered = check_folder(folder)
    for name, error in worst.items():
        print(f"{'ok  ' if error <= TOLERANCE else 'FAIL'}  {error:.1e}  {name}")
    for name in not_covered:
        print(f"not covered   {name}")
    failed = sum(error > TOLERANCE for error in worst.values())
    print(f"{len(worst) - failed} within {TOLERANCE:g}, {failed} outside, {len(not_covered)} not covered")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
