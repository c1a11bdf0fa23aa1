// kvt-hidden.h - hidden states between layers, kept in one run and taken in others, which start at a later layer (C++, inside libllama
// only; its functions for others are in kvt.h)
//
// A run that differs from the one before in its upper layers alone computes the same below. So the graph is cut at the hidden states
// that enter the first layer that differs: they become an input. What lies below is left out, but for what the rest needs besides.
#pragma once

#include "kvt.h"

#include "ggml.h"
#include "llama-cparams.h"
#include "llama-graph.h"

// Once a graph is built, and before it is allocated. Without a kvt_hidden that is to start at a layer, nothing is done; nor where the
// layers above read more of those below than their hidden states: a cache, say, that both share.
void kvt_hidden_cut(llm_graph_result & res, const llama_cparams & cparams);
