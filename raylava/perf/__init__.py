"""What a training step costs, as arithmetic. `shapes` has a model's dimensions and counts its parameters, `published`
those of backbones on the hub; `flops` the arithmetic of a step, `memory` what a device holds, `traffic` what goes over
the network; `hardware` the devices and prices; `choose` weighs ways to train against each other. Pure functions of
configurations: no weights, no Ray. Training chooses and measures itself by them; a whole recipe is estimate's.
"""
