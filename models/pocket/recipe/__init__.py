"""The recipe of Pocket: data generator, tokenizer, training, quantised export and evaluation."""
