"""Student-aware distillation by its published name: the flags of tools/compat/train_student_aware.py, which this runs.

python tools/compat/train.py
python tools/compat/train.py --config configs/default_config.json --batch-size 4 --epochs 3
python tools/compat/train.py --resume checkpoints/checkpoint_epoch_1
python tools/compat/train.py --datasets wikitext openwebtext c4 --use-wandb --project-name my-distillation
"""

from train_student_aware import main

from megakd.system.terminal import accept_any_encoding

if __name__ == "__main__":
    accept_any_encoding()
    main()
