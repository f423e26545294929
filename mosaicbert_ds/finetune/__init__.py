"""From a pretrained model to scores: GLUE, tasks of your own, the Pareto curve, loss by length."""
