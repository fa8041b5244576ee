"The parts of a decoder, and the decoder."
