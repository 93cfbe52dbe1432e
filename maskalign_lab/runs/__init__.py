"""From a recipe to a trained folder and back: recipes, batches, runs, experiments, evaluation, official files."""
