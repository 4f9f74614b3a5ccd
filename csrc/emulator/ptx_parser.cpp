// Recursive descent over the tokens of a module: declarations, function bodies, statements.
#include <algorithm>
#include <cstring>

#include "ptx_lexer.h"

namespace llmkern {
namespace emulator {

namespace {

constexpr int64_t kMaxVariableBytes = int64_t{1} << 30;
constexpr int kMaxScopes = 1 << 16;

std::vector<std::string> split_dots(const std::string& word) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t dot; (dot = word.find('.', begin)) != std::string::npos; begin = dot + 1) {
    parts.push_back(word.substr(begin, dot - begin));
  }
  parts.push_back(word.substr(begin));
  return parts;
}

class Parser {
 public:
  explicit Parser(TokenList list) : tokens_(std::move(list.tokens)), chains_(list.inlined_at) {}

  Module run() {
    while (peek().kind != Token::kEnd) top_level();
    for (const auto& late : unnamed_) {  // nvcc names its files at the end
      const auto file = module_.files.find(late.second.first);
      if (file != module_.files.end())
        module_.inlined_at[late.first] = file->second + ":" + std::to_string(late.second.second);
    }
    return std::move(module_);
  }

 private:
  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(pos_ + ahead, tokens_.size() - 1)];
  }
  Token take() {
    Token t = peek();
    if (pos_ + 1 < tokens_.size()) ++pos_;
    return t;
  }
  bool accept(const char* text) {
    if (!peek().is(text)) return false;
    take();
    return true;
  }
  void expect(const char* text) {
    if (!accept(text)) fail(std::string("expected '") + text + "', got '" + peek().text + "'");
  }
  [[noreturn]] void fail(const std::string& what) const { throw PtxError(peek().line, what); }

  std::string word() {
    if (peek().kind != Token::kWord) fail("expected a name, got '" + peek().text + "'");
    return take().text;
  }

  Operand constant() {
    const bool minus = accept("-"), invert = !minus && accept("~");
    if (peek().kind != Token::kNumber) fail("expected a number, got '" + peek().text + "'");
    const Token t = take();
    return parse_number(t, minus, invert);
  }

  int64_t integer() {
    const Operand o = constant();
    if (o.kind != Operand::kInteger) fail("expected an integer");
    return static_cast<int64_t>(o.bits);
  }

  int small_integer() {
    const int64_t v = integer();
    if (v < 0 || v > INT32_MAX) fail("integer out of range");
    return static_cast<int>(v);
  }

  void top_level() {
    const Token& t = peek();
    if (t.is(".version")) {
      take();
      module_.version = take().text;
    } else if (t.is(".target")) {
      take();
      module_.target = word();
      while (accept(",")) word();
    } else if (t.is(".address_size")) {
      take();
      if (integer() != 64) fail("only .address_size 64 is known");
    } else if (t.is(".file")) {
      file();
    } else if (t.is(".section")) {
      section();
    } else if (t.is(".loc")) {
      loc();
    } else if (t.is(".pragma")) {
      take();
      take();
      expect(";");
    } else {
      declaration();
    }
  }

  void file() {
    take();
    const int index = small_integer();
    if (peek().kind != Token::kString) fail("expected a file name");
    module_.files[index] = take().text;
    while (accept(",")) integer();
  }

  void section() {
    take();
    word();
    expect("{");
    for (int depth = 1; depth > 0;) {
      if (peek().kind == Token::kEnd) fail("a section is not closed");
      const Token t = take();
      depth += t.is("{") - t.is("}");
    }
  }

  void loc() {
    const int line = take().line;
    place_.file = small_integer();
    place_.source_line = small_integer();
    integer();
    place_.inlined = -1;
    const auto chain = chains_.find(line);
    if (chain != chains_.end()) note_inlined(chain->second);
    while (accept(",")) {
      const std::string key = word();
      if (key == "function_name") {
        word();
        if (accept("+")) integer();
      } else if (key == "inlined_at") {
        const int file = small_integer();
        const int at = small_integer();
        integer();
        const auto name = module_.files.find(file);
        const bool named = name != module_.files.end();
        const std::string path = named ? name->second : "file " + std::to_string(file);
        note_inlined(path + ":" + std::to_string(at));
        if (!named) unnamed_[module_.inlined_at.size() - 1] = {file, at};
      } else {
        fail("unknown part '" + key + "' of .loc");
      }
    }
  }

  void note_inlined(const std::string& where) {
    if (module_.inlined_at.empty() || module_.inlined_at.back() != where) {
      module_.inlined_at.push_back(where);
    }
    place_.inlined = static_cast<int>(module_.inlined_at.size()) - 1;
  }

  // Linkage, then a function or a variable.
  void declaration() {
    bool external = false;
    for (;; take()) {
      if (peek().is(".extern")) {
        external = true;
      } else if (!peek().is(".visible") && !peek().is(".weak") && !peek().is(".common")) {
        break;
      }
    }
    if (peek().is(".entry") || peek().is(".func")) return function(external);
    Variable v = variable();
    v.external = external;
    expect(";");
    module_.variables.push_back(std::move(v));
  }

  static bool space_named(const std::string& name, Space* space) {
    static const std::map<std::string, Space> spaces = {
        {".global", Space::kGlobal}, {".shared", Space::kShared}, {".local", Space::kLocal},
        {".param", Space::kParam},   {".const", Space::kConst},
    };
    const auto found = spaces.find(name);
    if (found == spaces.end()) return false;
    *space = found->second;
    return true;
  }

  // .shared .align 16 .b8 name[64] = {...}; without the final semicolon.
  Variable variable() {
    Variable v;
    v.line = peek().line;
    const std::string space = word();
    if (!space_named(space, &v.space)) {
      throw PtxError(v.line, "unknown declaration '" + space + "'");
    }
    int64_t align = 0;
    for (;;) {
      const std::string part = word();
      if (part == ".align") {
        align = integer();
      } else if (part == ".ptr") {
        pointer_attributes();
        break;
      } else if (part[0] == '.' && type_named(part.substr(1)) != Type::kNone) {
        v.type = type_named(part.substr(1));
        if (!peek().is(".ptr")) break;
      } else {
        throw PtxError(v.line, "unknown attribute '" + part + "' in a declaration");
      }
    }
    const int64_t size = bytes_of(v.type);
    if (size == 0 || v.type == Type::kPred) throw PtxError(v.line, "a variable needs a type");
    v.align = align > 0 ? align : size;
    if ((v.align & (v.align - 1)) != 0 || v.align > 1024) throw PtxError(v.line, "bad alignment");
    v.name = word();
    v.bytes = size * array_length();
    if (accept("=")) initializer(&v, static_cast<int>(size));
    return v;
  }

  void pointer_attributes() {
    Space ignored;
    if (space_named(peek().text, &ignored)) take();
    if (accept(".align")) integer();
  }

  int64_t array_length() {
    int64_t count = 1;
    while (accept("[")) {
      const int64_t n = peek().is("]") ? 0 : integer();
      expect("]");
      if (n < 0 || n > kMaxVariableBytes || count * n > kMaxVariableBytes) fail("array too large");
      count *= n;
    }
    return count;
  }

  void initializer(Variable* v, int size) {
    const auto append = [&](const Operand& o) {
      uint64_t bits = o.bits;
      if (o.kind == Operand::kFloat64 && size == 4) {
        double wide;
        std::memcpy(&wide, &bits, 8);
        const float narrow = static_cast<float>(wide);
        bits = 0;
        std::memcpy(&bits, &narrow, 4);
      }
      for (int i = 0; i < size; ++i) v->init.push_back(static_cast<uint8_t>(bits >> (8 * i)));
    };
    if (accept("{")) {
      do {
        if (peek().is("{")) fail("nested initialisers are not known");
        append(constant());
      } while (accept(","));
      expect("}");
    } else {
      append(constant());
    }
    if (v->bytes == 0) v->bytes = static_cast<int64_t>(v->init.size());
    if (static_cast<int64_t>(v->init.size()) > v->bytes) fail("more initial values than elements");
  }

  std::vector<Variable> parameter_list() {
    std::vector<Variable> list;
    expect("(");
    if (accept(")")) return list;
    do {
      if (peek().is(".reg")) fail("functions with .reg parameters are not known");
      Variable v = variable();
      if (v.space != Space::kParam) fail("a parameter must be .param");
      list.push_back(std::move(v));
    } while (accept(","));
    expect(")");
    return list;
  }

  void function(bool external) {
    Function f;
    f.line = peek().line;
    f.entry = take().is(".entry");
    f.external = external;
    if (!f.entry && peek().is("(")) f.results = parameter_list();
    f.name = word();
    if (peek().is("(")) f.parameters = parameter_list();
    performance_directives(&f);
    if (!accept(";")) {
      function_ = &f;
      f.scopes.emplace_back();
      scope_ = 0;
      expect("{");
      body();
    } else {
      f.external = true;
    }
    module_.functions.push_back(std::move(f));
  }

  void performance_directives(Function* f) {
    while (peek().kind == Token::kWord) {
      const std::string name = word();
      if (name == ".noreturn") continue;
      if (name == ".pragma") {
        take();
        expect(";");
        continue;
      }
      if (name != ".maxntid" && name != ".reqntid" && name != ".minnctapersm" &&
          name != ".maxnctapersm" && name != ".maxnreg") {
        fail("unknown directive '" + name + "' on a function");
      }
      int64_t product = 1;
      do product *= small_integer();
      while (product <= 1024 && accept(","));
      if (product > (1 << 20)) fail("number out of range after " + name);
      if (name == ".maxntid") f->threads_max = static_cast<int>(product);
      if (name == ".reqntid") f->threads_required = static_cast<int>(product);
    }
  }

  // Statements up to the brace that closes the function; inner braces open scopes.
  void body() {
    const int outermost = scope_;
    for (;;) {
      const Token& t = peek();
      if (t.kind == Token::kEnd) fail("a function is not closed");
      if (accept("{")) {
        if (function_->scopes.size() > kMaxScopes) fail("too many scopes");
        Scope inner;
        inner.parent = scope_;
        function_->scopes.push_back(std::move(inner));
        scope_ = static_cast<int>(function_->scopes.size()) - 1;
      } else if (accept("}")) {
        if (scope_ == outermost) return;
        scope_ = function_->scopes[scope_].parent;
      } else if (accept(";")) {
        continue;
      } else if (t.kind == Token::kWord && peek(1).is(":")) {
        label();
      } else if (t.is(".loc")) {
        loc();
      } else if (t.is(".reg")) {
        registers();
      } else if (t.is(".pragma")) {
        take();
        take();
        expect(";");
      } else if (t.kind == Token::kWord && t.text[0] == '.') {
        Variable v = variable();
        expect(";");
        const std::string name = v.name;
        scope().variables[name] = std::move(v);
      } else {
        statement();
      }
    }
  }

  Scope& scope() { return function_->scopes[scope_]; }

  void label() {
    const std::string name = word();
    expect(":");
    if (accept(".branchtargets")) {
      do scope().branch_targets[name].push_back(word());
      while (accept(","));
      expect(";");
      return;
    }
    if (!scope().labels.emplace(name, static_cast<int>(function_->body.size())).second) {
      fail("label '" + name + "' is defined twice");
    }
  }

  void registers() {
    take();
    const std::string type_word = word();
    const Type type = type_named(type_word.substr(type_word[0] == '.'));
    if (type == Type::kNone) fail("unknown register type '" + type_word + "'");
    do {
      const std::string name = word();
      if (accept("<")) {
        scope().families[name] = type;
        scope().family_size[name] = small_integer();
        expect(">");
      } else {
        scope().registers[name] = type;
      }
    } while (accept(","));
    expect(";");
  }

  void statement() {
    Statement s;
    s.place = place_;
    s.place.line = peek().line;
    s.scope = scope_;
    if (accept("@")) {
      s.guard_negated = accept("!");
      s.guard = word();
    }
    std::vector<std::string> parts = split_dots(word());
    s.opcode = parts[0];
    s.modifiers.assign(parts.begin() + 1, parts.end());
    if (!peek().is(";")) {
      do s.operands.push_back(operand());
      while (accept(","));
    }
    expect(";");
    function_->body.push_back(std::move(s));
  }

  std::vector<Operand> operand_list(const char* close) {
    std::vector<Operand> list;
    if (accept(close)) return list;
    do {
      if (peek().is("{") || peek().is("(")) fail("vectors do not nest");
      list.push_back(operand());
    } while (accept(","));
    expect(close);
    return list;
  }

  Operand operand() {
    Operand o;
    if (accept("{")) {
      o.kind = Operand::kVector;
      o.parts = operand_list("}");
    } else if (accept("(")) {
      o.kind = Operand::kList;
      o.parts = operand_list(")");
    } else if (accept("[")) {
      o.kind = Operand::kAddress;
      if (peek().kind == Token::kWord) o.name = word();
      o.offset = o.name.empty() ? integer() : added_offset();
      expect("]");
    } else if (peek().kind == Token::kWord || peek().is("!")) {
      o.negated = accept("!");
      o.name = word();
      if (o.name == "_") o.kind = Operand::kSink;
      if (accept("|")) {
        Operand second;
        second.name = word();
        if (second.name == "_") second.kind = Operand::kSink;
        o.parts.push_back(second);
      } else {
        o.offset = added_offset();
      }
    } else {
      return constant();
    }
    return o;
  }

  int64_t added_offset() {
    if (accept("+")) return integer();
    return peek().is("-") ? integer() : 0;
  }

  std::vector<Token> tokens_;
  std::map<int, std::string> chains_;
  std::map<size_t, std::pair<int, int>> unnamed_;  // of Module::inlined_at: (file, line)
  size_t pos_ = 0;
  Module module_;
  Function* function_ = nullptr;
  int scope_ = 0;
  Place place_;
};

}  // namespace

Module parse_ptx(const std::string& text) { return Parser(tokenize(text)).run(); }

}  // namespace emulator
}  // namespace llmkern
