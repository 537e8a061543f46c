"""Faults that the tests of the engine of generation must catch. None is in code for one instruction set alone."""

from tests.mutants import Fault

SESSION, PRODUCTS, FORMATS = (f"csrc/cpu/decode/{name}" for name in ("session.cpp", "products.h", "formats.h"))
ATTENTION, SAMPLING = "csrc/cpu/decode/attention.h", "csrc/cpu/decode/sampling.h"

FAULTS = (
    # a layer
    Fault("position of the first token for all", SESSION, "positions.read(work.position[i], buffer)", "positions.read(work.position[0], buffer)", "step_by_step"),
    Fault("scores not scaled", SESSION, "q[e] = values_here[e] * scale", "q[e] = values_here[e]", "step_by_step"),
    Fault("keys and values exchanged", SESSION, "(part == 1 ? keys : values)", "(part == 2 ? keys : values)", "step_by_step"),
    Fault("layers share a cache", SESSION, "(((layer * B_ + work.row[i]) * H) + head)", "((work.row[i] * H) + head)", "step_by_step"),
    Fault("rows share a cache", SESSION, "(((layer * B_ + work.row[i]) * H) + head)", "(((layer * B_) * H) + head)", "step_by_step"),
    Fault("a token does not attend to itself", SESSION, "keys_here = work.position[at] + 1", "keys_here = std::max<int64_t>(1, work.position[at])", "step_by_step"),
    Fault("queries of two rows attended together", SESSION, "place(i + k) == at + k && work.row[at + k] == work.row[at]", "place(i + k) == at + k", "bits_of_steps"),
    Fault("queries with others between them attended together", SESSION, "place(i + k) == at + k && work.row[at + k]", "work.row[at + k]", "chosen_tokens"),
    Fault("the last layer continues with the first tokens", SESSION, "places == nullptr ? i : places[i]", "places == nullptr ? i : i", "chosen_tokens"),
    Fault("queries of the last layer kept for the first tokens", SESSION, "put_qkv(place(i), begin, y, count)", "put_qkv(i, begin, y, count)", "chosen_tokens"),
    Fault("norms taken twice of the last queries", SESSION, "w.pre_norm ? first : nullptr, false, places}", "first, false, places}", "chosen_tokens"),
    Fault("the last MLP reads the first tokens", SESSION, "!w.pre_norm, places}", "!w.pre_norm, nullptr}", "chosen_tokens"),
    Fault("the first norm before the MLP", SESSION, "w.pre_norm ? &block.norm2 : &block.norm1, !w.pre_norm", "&block.norm1, !w.pre_norm", "step_by_step"),
    Fault("no activation", SESSION, "activate_row(w.activation, y, count); }", "activate_row(w.activation, y, 0 * count); }", "step_by_step"),
    Fault("norms after blocks left out", SESSION, "pending = &block.norm2;", "pending = nullptr;", "step_by_step"),
    Fault("normalised vectors not written back", SESSION, "if (source.stores) {", "if (false) {", "step_by_step"),
    Fault("no final norm", SESSION, "w.pre_norm ? &w.final_norm : pending", "w.pre_norm ? nullptr : pending", "step_by_step"),
    Fault("vectors between products not by row", SESSION, "vectors.data() + i * input_stride<Format>(next.words)", "vectors.data() + 0 * input_stride<Format>(next.words)", "step_by_step"),
    Fault("floats between products not by row", SESSION, "reinterpret_cast<float*>(vectors.data()) + i * next.K + begin", "reinterpret_cast<float*>(vectors.data()) + begin", "step_by_step"),
    Fault("ends of later pieces of a prompt not moved", SESSION, "end[made] - begin", "end[made] - 0 * begin", "in_pieces"),
    Fault("logits of later pieces written over the first", SESSION, "logits.mutable_data_ptr<float>() + before * w_->V", "logits.mutable_data_ptr<float>()", "in_pieces"),
    Fault("every row draws the first row's token", SESSION, "[&](int64_t i) { drawn_[i] = drawn; }", "[&](int64_t i) { drawn_[0 * i] = drawn; }", "generate_takes"),
    Fault("a token outside the vocabulary", SESSION, "token[i] < 0 || token[i] >= w_->V", "token[i] < 0", "refuses_places"),
    Fault("two threads in one session", SESSION, "if (flag_.exchange(true)) {", "if (flag_.exchange(true) && false) {", "guards_itself"),
    # products
    Fault("later chains overwrite", PRODUCTS, "(begin == 0 ? result : Vec::loadu(out) + result)", "result", "step_by_step"),
    Fault("no bias", PRODUCTS, "matrix.bias == nullptr ? Vec(0.0f) :", "true ? Vec(0.0f) :", "step_by_step"),
    Fault("no scale of rows", PRODUCTS, "scale * Vec::loadu(matrix.scale + n + i, count)", "scale", "step_by_step"),
    Fault("scale of the first vector for all", PRODUCTS, "const Vec scale(x.scale[b]);", "const Vec scale(x.scale[0]);", "step_by_step"),
    Fault("one panel for all of a tile", PRODUCTS, "matrix.data + (panel + r) * words * kVec", "matrix.data + panel * words * kVec", "step_by_step"),
    # formats
    Fault("bfloat16 cut off, not rounded", FORMATS, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16", "step_by_step"),
    Fault("a part begins at 0", FORMATS, "reinterpret_cast<uint16_t*>(out) + begin;", "reinterpret_cast<uint16_t*>(out);", "step_by_step"),
    Fault("float32 parts begin at 0", FORMATS, "std::memcpy(out + begin, x, count * sizeof(float));", "std::memcpy(out, x, count * sizeof(float));", "step_by_step"),
    Fault("int8 from a magnitude too small", FORMATS, "inverse = most / largest;", "inverse = 0.97f * most / largest;", "step_by_step"),
    # attention
    Fault("later queries see the keys of the first", ATTENTION, "weigh_scores(scores + i * padded, first + i)", "weigh_scores(scores + i * padded, first)", "bits_of_steps"),
    Fault("one denominator for all queries", ATTENTION, "return x * Vec(scale[i]);", "return x * Vec(scale[0]);", "bits_of_steps"),
    # drawing
    Fault("one uniform number for all rows", SAMPLING, "static_cast<uint32_t>(row),", "0 * static_cast<uint32_t>(row),", "seed_row"),
    Fault("the same uniform number at each draw", SAMPLING, "static_cast<uint64_t>(sampling.draw);", "0 * static_cast<uint64_t>(sampling.draw);", "seed_row"),
    Fault("temperature ignored", SAMPLING, "static_cast<float>(1.0 / sampling.temperature)", "1.0f", "frequencies"),
    Fault("penalty always divides", SAMPLING, "logits[i] > 0.0f ? logits[i] / penalty : logits[i] * penalty", "logits[i] / penalty", "frequencies"),
    Fault("top-p one token short", SAMPLING, "if (running >= wanted) return i + 1;", "if (running >= wanted) return std::max<int64_t>(1, i);", "top_p"),
    Fault("min-p not applied after top-k", SAMPLING, "while (kept > 1 && weights_[kept - 1]", "while (kept > 1 && false && weights_[kept - 1]", "frequencies"),
    Fault("ties by the higher id", SAMPLING, "logits[a] == logits[b] && a < b", "logits[a] == logits[b] && a > b", "equal_logits"),
    Fault("NaN is drawn from", SAMPLING, "if (!(before < std::numeric_limits<float>::infinity())) return kNotFinite;", "", "damaged"),
)  # fmt: skip
