// Words, numbers and punctuation of PTX text. An opcode with its modifiers is one word; so is a
// special register (%tid.x). Comments are dropped, but for the "@[ ... ]" chains of inlined calls.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "ptx_ast.h"

namespace llmkern {
namespace emulator {

struct Token {
  enum Kind { kWord, kNumber, kString, kPunctuation, kEnd };
  Kind kind = kEnd;
  std::string text;
  int line = 0;

  bool is(const char* s) const { return kind != kString && text == s; }
};

struct TokenList {
  std::vector<Token> tokens;              // the last one is kEnd
  std::map<int, std::string> inlined_at;  // PTX line -> "file.py:17:18" of a comment @[ ... ]
};

TokenList tokenize(const std::string& text);

// The value of a kNumber token: decimal, 0x, 0b, 0f (f32 bits), 0d (f64 bits). Raises PtxError.
Operand parse_number(const Token& token, bool minus, bool invert);

}  // namespace emulator
}  // namespace llmkern
