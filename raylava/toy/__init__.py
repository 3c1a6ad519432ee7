"""Toy assets: a corpus of drawn images and small trained backbones, to run everything on a laptop without downloads.

- scenes.py: draws scenes of colored shapes, with their captions, questions and answers
- corpus.py: writes images, captions, conversations and held-out questions as LLaVA JSON
- language.py, vision.py: train small backbones of transformers' own classes
- assets.py: builds corpus and backbones as one artifact
- demo.py: `raylava demo`
"""
