"""JSON schemas as GLM needs them: the types of tool arguments, and the grammar that binds an answer."""
