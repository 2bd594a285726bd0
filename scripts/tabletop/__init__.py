"""The parts of scripts/demo.py: a simulator, the dataset and model that it starts from, and the evaluation."""
