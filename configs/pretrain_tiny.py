"""Trains the embedded base model: a 2 M parameter Llama on the standard library's own sources and help texts.

    python run.py --config configs/pretrain_tiny.py

The corpus is read from the interpreter that runs this, so it differs a little between Python versions.
"""

from ftjax.config import Compute, Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.stdlib_text import StdlibText
from ftjax.models.sources import Scratch
from ftjax.peft.full import Full


def get_config() -> Run:
    return Run(
        name="pretrain_tiny",
        model=Scratch(
            family="llama",
            vocab=4096,
            dtype="bfloat16",
            settings=(
                "hidden_size=160",
                "intermediate_size=448",
                "num_hidden_layers=5",
                "num_attention_heads=4",
                "num_key_value_heads=2",
                "head_dim=40",
                "max_position_embeddings=512",
                "rms_norm_eps=1e-5",
                "rope_theta=10000.0",
                "hidden_act=silu",
                "tie_word_embeddings=true",
                "initializer_range=0.02",
                "bos_token_id=1",
                "eos_token_id=2",
                "pad_token_id=0",
            ),
        ),
        peft=Full(),
        data=StdlibText(),
        loader=Loader(max_length=256),
        optim=Optim(lr=3e-3, schedule="cosine", warmup=100, final=0.05, weight_decay=0.1, b2=0.95),
        train=Train(steps=1800, batch=12, log_every=50),
        evaluate=Evaluate(every=600, examples=256, generate=4, max_new_tokens=32),
        compute=Compute(layers="unroll"),
    )
