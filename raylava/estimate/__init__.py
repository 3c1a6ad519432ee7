"""What a recipe will cost, computed before anything runs: `shapes` has a model's dimensions and counts its parameters,
`flops` the arithmetic of a step, and the peaks of devices. Pure functions of configurations: no weights, no Ray.
Training's figures (MFU) take their numbers from here as well.
"""
