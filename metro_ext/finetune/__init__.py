"""Fine-tuning of a pretrained run on GLUE and SuperGLUE: ``python -m metro_ext.finetune``."""
