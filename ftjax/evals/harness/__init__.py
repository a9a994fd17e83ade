"""Our models as lm-evaluation-harness sees them; needs the extra `eval`. See `ftjax.evals.lm_eval` for the command."""
