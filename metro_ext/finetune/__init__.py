"""Fine-tuning of a run on GLUE, SuperGLUE and SQuAD: ``python -m metro_ext.finetune``."""
