"""Layers that fine-tuning leaves as they were."""

import torch
from training_testing import MakeTrainer


def test_layer_decay_freezes_the_layers_below_its_scale(trainer_for: MakeTrainer) -> None:
    # The classifier has the scale 1, the layers of the fourth and third stage 0.5 and 0.25.
    trainer = trainer_for(layer_decay=0.5, layer_decay_no_opt_scale=0.4, epochs=1)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.run()
    after = dict(trainer.model.named_parameters())
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert {name.partition(".")[0] for name in changed} == {"layer4", "fc"}
    assert any(".se." in name for name in changed)  # its attention is trained with the block
    stored = {name: weight for name, weight in after.items() if not weight.requires_grad}
    assert stored.keys() == {
        name for name in before if name.partition(".")[0] not in ("layer4", "fc")
    }
