"""Quality: perplexity, divergence from the original, multiple-choice tasks; all with paired standard errors."""
