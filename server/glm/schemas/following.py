"""How a grammar is followed, in the trial of it and in the engine alike."""

from llguidance import LLMatcher, LLParserLimits

# Of one step of an answer. By default an ambiguous grammar takes 0.1 to 0.8 s for each token.
STEP_ITEMS = 10_000
# A kilobyte or two each.
LEXER_STATES = 20_000


def parser_limits() -> LLParserLimits:
    """What a step may take."""
    return LLParserLimits(step_max_items=STEP_ITEMS, max_lexer_states=LEXER_STATES, verbose_errors=False)


def reason_of(matcher: LLMatcher) -> str:
    """What llguidance says is wrong, without the state and the trace that it puts below."""
    return str(matcher.get_error()).partition("\n")[0][:300]
