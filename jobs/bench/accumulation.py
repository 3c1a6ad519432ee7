"""How the precision in which a ZeRO stage adds the gradients of packs changes the gradient of a step.

    raylava toy toy
    python jobs/bench/accumulation.py toy/backbones [--packs N …]

DeepSpeed adds packs in bf16 at ZeRO stages 0 and 1, and in fp32 at stages 2 and 3. Adam's first moments after one step
are a tenth of the gradient. They are compared with those of an fp32 run, and with those of stage 2, on one rank.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raylava.config.recipe import Language, Model, Training, Vision, ZeroConfig
from raylava.estimate.synthetic import synthetic_pack
from raylava.models.llava import DTYPES, build_llava
from raylava.models.packs import PackTensors
from raylava.models.registry import ResolvedModel, resolve_model

SAMPLES = [(60, 1, 10), (50, 1, 8)]  # tokens, images and loss tokens of the samples of a pack


def first_moments(model: ResolvedModel, stage: int, precision: str, packs: list[PackTensors]) -> torch.Tensor:
    """Return Adam's first moments of all weights after one step, as one vector."""
    from deepspeed.utils import safe_get_full_optimizer_state

    from raylava.train.engine import Engine

    llava = build_llava(model, 0, DTYPES[precision], "varlen")
    training = Training.model_validate({"lr": 1e-3, "precision": precision, "zero": ZeroConfig(stage=stage)})
    engine = Engine(llava, "finetune", training, 10, torch.device("cpu"))
    engine.step(0, packs)
    optimizer: Any = engine._engine.optimizer
    if stage == 0 and precision == "bf16":
        masters = [master for group in optimizer.fp32_groups for master in group]
        weights = [weight for group in optimizer.fp16_groups for weight in group]
        moments = {
            id(weight): optimizer.optimizer.state[master]["exp_avg"]
            for weight, master in zip(weights, masters, strict=True)
        }
        return torch.cat([moments[id(weight)].flatten() for weight in llava.parameters() if weight.requires_grad])
    if hasattr(optimizer, "_hp_optimizer_states_linked"):  # stages 1 and 2 link too early when there are several groups
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    states = [safe_get_full_optimizer_state(weight, "exp_avg") for weight in llava.parameters() if weight.requires_grad]
    return torch.cat([state.flatten().float() for state in states])


def main() -> None:
    """Print one line per number of packs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("backbones", type=Path)
    parser.add_argument("--packs", type=int, nargs="+", default=[4, 16, 64])
    arguments = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    vision, language = Vision(name=str(arguments.backbones / "clip")), Language(name=str(arguments.backbones / "gemma"))
    model = resolve_model(Model(language=language, vision=vision))
    config = build_llava(model, 0, torch.float32).config
    shape = model.shape(config.text_config.vocab_size)
    for count in arguments.packs:
        torch.manual_seed(0)
        packs = [synthetic_pack(SAMPLES, shape, config.image_token_id) for _ in range(count)]
        exact = first_moments(model, 2, "fp32", packs)
        moments = {stage: first_moments(model, stage, "bf16", packs) for stage in (0, 1, 2)}
        for stage, value in moments.items():
            from_exact = float((value - exact).norm() / exact.norm())
            from_stage_2 = float((value - moments[2]).norm() / moments[2].norm())
            sys.stdout.write(
                f"{count} packs, stage {stage}: {from_exact:.2%} from fp32, {from_stage_2:.2%} from stage 2\n"
            )


if __name__ == "__main__":
    main()
