#include "ptx_lexer.h"

#include <cctype>

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
      while (in_word(at(pos_)) || (at(pos_) == ':' && at(pos_ + 1) == ':' && in_word(at(pos_ + 2)))) {
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

}  // namespace emulator
}  // namespace llmkern
