"""The demo model that ships with ktd: its corpus, tokenizer, trainer, converter and measurements."""
