"""Compares every importer with the official implementation, on small random weights.

    pip install -e ".[parity]" && python -m tests.parity [NAME ...] [--store]

Builds the official models (tests/parity/official.py), writes them as their authors do, imports them, and
prints the largest difference of every answer; swaps an activation, an epsilon, a mask or a pooling, and prints
what that changes; lets the official loaders open our exports. Exit code 1 where a difference is beyond its
tolerance, or a planted mistake is not. ``--store`` renews tests/parity/stored, which the test suite reads without torch.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
import torch

from tests.parity import compare, official

STORED = pathlib.Path(__file__).parent / "stored"


def reopened(case, folder):
    """Largest difference of the answers of the official model that its own loader builds from our export in ``folder``."""
    image, ids = case["image"], case["ids"]
    if case["release"] == "hf_clip":
        from transformers import CLIPModel
        net = CLIPModel.from_pretrained(folder).eval()
    else:
        import open_clip
        net = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        if case["release"] == "hf_clip":
            both = [n(pixel_values=image, input_ids=ids).logits_per_image for n in (net, case["net"])]
        else:
            both = [n.encode_image(image) @ n.encode_text(ids).T for n in (net, case["net"])]
    return float((both[0] - both[1]).abs().max())


def resized():
    """Tables of positions and what torch makes of them, as the two releases call it: {"<kernel>/<old>-<new>": [2 arrays]}."""
    out = {}
    for old, new in ((4, 7), (7, 4), (6, 9), (3, 3)):
        table = torch.randn(1 + old * old, 5, generator=torch.Generator().manual_seed(old))
        grid = table[1:].reshape(1, old, old, 5).permute(0, 3, 1, 2)
        for kernel, options in (("antialias", dict(antialias=True)), ("border", {})):
            result = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, **options)
            result = torch.cat([table[:1], result.permute(0, 2, 3, 1).reshape(-1, 5)])
            out[f"{kernel}/{old}-{new}/in"], out[f"{kernel}/{old}-{new}/out"] = table.numpy(), result.numpy()
        line = torch.nn.functional.interpolate(table.T[None], size=new * 3, mode="linear", align_corners=False)[0].T
        out[f"sequence/{old}-{new}/in"], out[f"sequence/{old}-{new}/out"] = table.numpy(), line.numpy()
    return out


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--store", action="store_true", help="renew tests/parity/stored")
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for make in official.CASES:
            case = make()
            if args.names and case["name"] not in args.names:
                continue
            folder, ours = (STORED if args.store else work) / case["name"], work / (case["name"] + "-ours")
            official.write_case(case, folder)
            case = make()      # a training step has moved the first one
            model, io = compare.load_case(folder, ours)
            found = compare.differences(model, io)
            back = reopened(case, compare.export_case(folder, ours, work / (case["name"] + "-back"))) if case["release"] != "openai_clip" else 0.0
            planted = compare.planted(ours, io)
            step = compare.step_differences(folder, ours) if (folder / "step.npz").exists() else {}
            good = compare.within(found) and back == 0.0 and all(not compare.within(x) for x in planted.values()) and compare.step_within(step)
            failed += [] if good else [case["name"]]
            print(f"{case['name']:24}{'ok  ' if good else 'FAIL'}", *(f"{k} {v:.1e}" for k, v in found.items()),
                  *(f"| {name}: {max(x.values()):.1e}" for name, x in planted.items()),
                  *(f"| step {k} {v:.1e}" for k, v in step.items()), f"| reopened {back:.0e}", flush=True)
    if args.store:
        np.savez_compressed(STORED / "resize.npz", **resized())
    print(f"torch {torch.__version__}, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
