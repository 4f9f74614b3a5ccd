#include "ptx_lexer.h"

#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace llmkern {
namespace emulator {
namespace {

bool starts_word(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}
bool in_word(char c) { return starts_word(c) || std::isdigit(static_cast<unsigned char>(c)); }
bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }

class Lexer {
 public:
  explicit Lexer(const std::string& text) : text_(text) {}

  TokenList run() {
    while (skip_blank()) next();
    push(Token::kEnd, "end of file");
    return std::move(out_);
  }

 private:
  char at(size_t i) const { return i < text_.size() ? text_[i] : '\0'; }

  void push(Token::Kind kind, std::string text) {
    Token t;
    t.kind = kind;
    t.text = std::move(text);
    t.line = line_;
    out_.tokens.push_back(std::move(t));
  }

  // Moves to the next character that is no space or comment; false at the end.
  bool skip_blank() {
    while (pos_ < text_.size()) {
      const char c = text_[pos_];
      if (c == '\n') {
        ++line_;
        ++pos_;
      } else if (std::isspace(static_cast<unsigned char>(c))) {
        ++pos_;
      } else if (c == '/' && at(pos_ + 1) == '/') {
        line_comment();
      } else if (c == '/' && at(pos_ + 1) == '*') {
        block_comment();
      } else {
        return true;
      }
    }
    return false;
  }

  void line_comment() {
    size_t end = text_.find('\n', pos_);
    if (end == std::string::npos) end = text_.size();
    const std::string comment = text_.substr(pos_, end - pos_);
    const size_t chain = comment.find("@[ ");
    if (chain != std::string::npos) {
      std::string where = comment.substr(chain + 3);
      while (!where.empty() && (where.back() == ']' || where.back() == ' ')) where.pop_back();
      out_.inlined_at[line_] = where;
    }
    pos_ = end;
  }

  void block_comment() {
    const size_t end = text_.find("*/", pos_ + 2);
    if (end == std::string::npos) throw PtxError(line_, "a comment is not closed");
    for (size_t i = pos_; i < end; ++i) line_ += text_[i] == '\n';
    pos_ = end + 2;
  }

  void next() {
    const char c = text_[pos_];
    const size_t begin = pos_;
    if (is_digit(c) || (c == '.' && is_digit(at(pos_ + 1)))) {
      return number();
    }
    if (starts_word(c)) {
      while (in_word(at(pos_)) ||
             (at(pos_) == ':' && at(pos_ + 1) == ':' && in_word(at(pos_ + 2)))) {
        pos_ += at(pos_) == ':' ? 2 : 1;
      }
      return push(Token::kWord, text_.substr(begin, pos_ - begin));
    }
    if (c == '"') {
      const size_t end = text_.find_first_of("\"\n", pos_ + 1);
      if (end == std::string::npos || text_[end] != '"') {
        throw PtxError(line_, "a string is not closed");
      }
      pos_ = end + 1;
      return push(Token::kString, text_.substr(begin + 1, end - begin - 1));
    }
    if (std::string("@!|,;:(){}[]<>=+-*&~/?").find(c) == std::string::npos) {
      throw PtxError(line_, std::string("unexpected character '") + c + "'");
    }
    ++pos_;
    push(Token::kPunctuation, std::string(1, c));
  }

  void number() {
    const size_t begin = pos_;
    while (in_word(at(pos_)) && at(pos_) != '%' && at(pos_) != '$') {
      const char c = at(pos_++);
      const bool decimal = at(begin + 1) != 'x' && at(begin + 1) != 'f' && at(begin + 1) != 'd' &&
                           at(begin + 1) != 'F' && at(begin + 1) != 'D' && at(begin + 1) != 'X';
      const bool sign_next = at(pos_) == '+' || at(pos_) == '-';
      if (decimal && (c == 'e' || c == 'E') && sign_next) ++pos_;
    }
    push(Token::kNumber, text_.substr(begin, pos_ - begin));
  }

  const std::string& text_;
  size_t pos_ = 0;
  int line_ = 1;
  TokenList out_;
};

}  // namespace

TokenList tokenize(const std::string& text) { return Lexer(text).run(); }

Type type_named(const std::string& name) {
  static const std::map<std::string, Type> types = {
      {"pred", Type::kPred},   {"b8", Type::kB8},         {"b16", Type::kB16},
      {"b32", Type::kB32},     {"b64", Type::kB64},       {"b128", Type::kB128},
      {"u8", Type::kU8},       {"u16", Type::kU16},       {"u32", Type::kU32},
      {"u64", Type::kU64},     {"s8", Type::kS8},         {"s16", Type::kS16},
      {"s32", Type::kS32},     {"s64", Type::kS64},       {"f16", Type::kF16},
      {"f16x2", Type::kF16x2}, {"bf16", Type::kBf16},     {"bf16x2", Type::kBf16x2},
      {"tf32", Type::kTf32},   {"f32", Type::kF32},       {"f32x2", Type::kF32x2},
      {"f64", Type::kF64},     {"e4m3x2", Type::kE4m3x2}, {"e5m2x2", Type::kE5m2x2},
  };
  const auto found = types.find(name);
  return found == types.end() ? Type::kNone : found->second;
}

Operand parse_number(const Token& token, bool minus, bool invert) {
  const std::string& text = token.text;
  const auto fail = [&](const std::string& why) {
    throw PtxError(token.line, "'" + text + "' " + why);
  };
  Operand o;
  char* end = nullptr;
  errno = 0;
  const char kind =
      text.size() > 1 && text[0] == '0' ? static_cast<char>(std::tolower(text[1])) : ' ';
  if (kind == 'f' || kind == 'd') {
    o.kind = kind == 'f' ? Operand::kFloat32 : Operand::kFloat64;
    const size_t digits = kind == 'f' ? 8 : 16;
    if (text.size() != digits + 2) fail("must have " + std::to_string(digits) + " hex digits");
    o.bits = std::strtoull(text.c_str() + 2, &end, 16);
    if (minus) o.bits ^= uint64_t{1} << (4 * digits - 1);
  } else if (kind != 'x' && text.find_first_of(".eE") != std::string::npos) {
    o.kind = Operand::kFloat64;
    double value = std::strtod(text.c_str(), &end);
    if (minus) value = -value;
    std::memcpy(&o.bits, &value, 8);
  } else {
    o.kind = Operand::kInteger;
    o.bits = kind == 'b' ? std::strtoull(text.c_str() + 2, &end, 2)
                         : std::strtoull(text.c_str(), &end, 0);
    if (*end == 'U' || *end == 'u') ++end;
    if (minus) o.bits = 0 - o.bits;
    if (invert) o.bits = ~o.bits;
  }
  if (*end != '\0' || errno == ERANGE) fail("is no number");
  return o;
}

}  // namespace emulator
}  // namespace llmkern
