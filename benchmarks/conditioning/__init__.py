"""Which basis, slices and scale a core learns in best: accuracies over rates, ranks and tasks."""
