"""How good are masks, probabilities and samples: metrics on arrays, and the evaluation of whole folders."""
