"""From files to batches: rows -> typed rows -> encoded examples -> packed rows -> `TokenBatch`.

    prepared = prepare(Local(path="train.jsonl"), Loader(max_length=512), tokenizer, seed=0)
    batches = Batches(prepared.train, loader=Loader(max_length=512), batch=8, seed=0, fingerprint=prepared.fingerprint)
    batch = batches.next()                  # tokens, positions, segments, weights: [accumulate, batch / accumulate, T]

Modules, in the order the data flow: `reader`, `formats` (with `convert`), `templates`, `tokenizer`, `encode`, `cache`,
`prepare`, `packing`, `batches`, `pipeline`, `prefetch`. A data set is one file under `tasks/`.
"""
