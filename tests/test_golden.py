"""Parameter tables per config and stage: path, shape, dtype, logical axes, trained or not, and the spec on a
2 x 2 x 2 mesh. A refactor's effect is a diff. ``python -m tests.test_golden`` writes them anew."""

import pathlib

import pytest

from tests.tiny import config
from vlm_jax import stage as stages
from vlm_jax.train import init

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = [("clip", ""), ("clip", "small"), ("clip", "b32"), ("clip", "b32,text=cbow"), ("clip", "rn50"), ("clip", "bigg14"),
         ("coca", ""), ("coca", "base"), ("coca", "2b"), ("coca", "b32_open"), ("albef", ""), ("albef", "base"), ("blip", ""), ("blip", "base"),
         ("vqkd", ""), ("beit3", ""), ("beit3", "base,tokenizer=vqkd"), ("vlmo", ""), ("vlmo", "base"), ("vlmo", "base_plus"),
         ("blip2", ""), ("blip2", "opt2.7b"), ("blip2", "flant5xl,vit=clip_l14"),
         ("blip2", "flant5xl,finetune,16gb,tune=lora"), ("instructblip", ""), ("instructblip", "vicuna7b"),
         ("instructblip", "flant5xl")]
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def tables(name, arg):
    """file name -> table, for every stage of the config."""
    whole = config(name, arg)
    for stage_name, section in whole.stages.items():
        if section.model == stages.INHERIT:      # the model of another stage
            continue
        section = stages.inherit(whole, pathlib.Path(), stage_name)
        section.data.tokenizer = section.data.tokenizer if section.data.train else ""
        for key, value in section.model.get("tokens", {}).items():
            if not section.data.tokenizer:
                section.model.tokens[key] = max(value, 0) if key != "vocab" else max(value, 1000)
        plan = stages.resolve(section, stage_name).plan
        yield f"{name}-{arg or 'default'}-{stage_name}.txt".replace("=", "_").replace(",", "_"), init.golden(plan, SIZES)


@pytest.mark.parametrize("name, arg", CASES)
def test_parameters_are_as_recorded(name, arg):
    for file, table in tables(name, arg):
        assert table == (GOLDEN / file).read_text(), f"{file} differs; if that is meant: python -m tests.test_golden"


def main():
    for name, arg in CASES:
        for file, table in tables(name, arg):
            (GOLDEN / file).write_text(table)


if __name__ == "__main__":
    main()
