"""Reports: numbers and pictures in, PNG files and one self-contained HTML page out."""

from vlm_jax.report.report import write_report

__all__ = ["write_report"]
