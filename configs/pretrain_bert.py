"""A tiny BERT (or, below, RoBERTa) learns the standard library's sources as a masked language model, from nothing.

    python run.py --config configs/pretrain_bert.py
    python run.py --config configs/pretrain_bert.py name=pretrain_roberta model.family=roberta \
        model.tokenizer_kind=bpe-mask "model.settings=$ROBERTA"          # see experiments/e003_banking77

Then: python run.py --config configs/classify.py model.path=runs/pretrain_bert/model data.path=train.csv
"""

from ftjax.config import Evaluate, Loader, Optim, Run, Train
from ftjax.data.tasks.stdlib_text import StdlibText
from ftjax.models.sources import Scratch
from ftjax.objectives.masked_lm import MaskedLM
from ftjax.peft.full import Full


def get_config() -> Run:
    return Run(
        name="pretrain_bert",
        model=Scratch(
            family="bert",
            vocab=4096,
            tokenizer_kind="wordpiece",
            settings=(
                "hidden_size=128",
                "intermediate_size=512",
                "num_hidden_layers=4",
                "num_attention_heads=4",
                "hidden_act=gelu",
                "max_position_embeddings=128",
                "type_vocab_size=2",
                "layer_norm_eps=1e-12",
                "pad_token_id=0",
            ),
        ),
        peft=Full(),
        objective=MaskedLM(),
        data=StdlibText(),
        loader=Loader(max_length=128),
        optim=Optim(lr=2e-3, schedule="cosine", warmup=200, final=0.05, weight_decay=0.01, b2=0.98),
        train=Train(steps=1500, batch=32, log_every=100),
        evaluate=Evaluate(every=500, examples=512),
    )
