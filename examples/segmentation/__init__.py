"""The segmentation job: a pretrained UNETR, a few volumes, and an adapter of tCURLoRA.

``examples/unetr_segmentation.py`` trains. ``examples/predict.py`` segments new volumes with what
was trained. ``examples/export.py`` writes plain MONAI checkpoints. docs/segmentation.md walks the
whole way.
"""
