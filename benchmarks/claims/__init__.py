"""Claims of the papers on procedural scenes (``python -m benchmarks.claims``), by the family that they are about."""

from benchmarks.claims import albef, blip, blip2, clip, multiway
from benchmarks.claims.claim import Claim

CLAIMS: dict[str, Claim] = {**albef.CLAIMS, **clip.CLAIMS, **blip.CLAIMS, **multiway.CLAIMS, **blip2.CLAIMS}
