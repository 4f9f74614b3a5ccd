#include "inline_calls.h"

#include <algorithm>

namespace llmkern {
namespace emulator {
namespace {

constexpr size_t kMostStatements = size_t{1} << 20;

class Inliner {
 public:
  Inliner(const Module& module, const Function& entry) : module_(module), out_(entry) {
    out_.body.clear();
    append(entry, 0, "");
  }

  Function take() { return std::move(out_); }

 private:
  const Function* defined(const std::string& name) const {
    for (const Function& f : module_.functions) {
      if (!f.entry && !f.external && f.name == name) return &f;
    }
    return nullptr;
  }

  // The body of f, whose scopes are at `base` and on. `end`: the label that ret goes to, if any.
  void append(const Function& f, int base, const std::string& end) {
    open_.push_back(&f);
    std::vector<int> moved;
    for (Statement s : f.body) {
      moved.push_back(static_cast<int>(out_.body.size()));
      s.scope += base;
      if (s.opcode == "call" && called(s) != nullptr) {
        open_call(s, *called(s));
      } else {
        if (s.opcode == "ret" && !end.empty()) go_to(&s, end);
        push(std::move(s));
      }
    }
    moved.push_back(static_cast<int>(out_.body.size()));
    for (size_t i = 0; i < f.scopes.size(); ++i) {
      for (const auto& label : f.scopes[i].labels) {
        out_.scopes[static_cast<size_t>(base) + i].labels[label.first] =
            moved[static_cast<size_t>(label.second)];
      }
    }
    open_.pop_back();
  }

  void push(Statement s) {
    if (out_.body.size() >= kMostStatements) {
      throw PtxError(s.place.line, "the calls open into too many statements");
    }
    out_.body.push_back(std::move(s));
  }

  static void go_to(Statement* s, const std::string& label) {
    s->opcode = "bra";
    s->modifiers.clear();
    s->operands.assign(1, Operand());
    s->operands[0].name = label;
  }

  // (results), function, (parameters): where the function's name is.
  static size_t name_at(const Statement& s) {
    return !s.operands.empty() && s.operands[0].kind == Operand::kList;
  }

  const Function* called(const Statement& s) const {
    const size_t i = name_at(s);
    return s.operands.size() > i ? defined(s.operands[i].name) : nullptr;
  }

  void open_call(const Statement& s, const Function& f) {
    if (std::find(open_.begin(), open_.end(), &f) != open_.end()) {
      throw PtxError(s.place.line, "'" + f.name + "' calls itself, which is not known");
    }
    if (s.modifiers.size() > 1 || (s.modifiers.size() == 1 && s.modifiers[0] != "uni")) {
      throw PtxError(s.place.line, "call: unknown modifier");
    }
    const std::string end = "end of call " + std::to_string(++calls_);
    if (!s.guard.empty()) {
      Statement skip = s;
      skip.guard_negated = !s.guard_negated;
      go_to(&skip, end);
      push(std::move(skip));
    }
    const int base = static_cast<int>(out_.scopes.size());
    for (Scope scope : f.scopes) {
      scope.labels.clear();
      if (scope.parent >= 0) scope.parent += base;
      out_.scopes.push_back(std::move(scope));
    }
    const size_t i = name_at(s);
    static const std::vector<Operand> none;
    bind(s, f.results, i == 1 ? s.operands[0].parts : none, base);
    bind(s, f.parameters, s.operands.size() > i + 1 ? s.operands[i + 1].parts : none, base);
    append(f, base, end);
    const int after = static_cast<int>(out_.body.size());
    out_.scopes[static_cast<size_t>(base)].labels[end] = after;
    out_.scopes[static_cast<size_t>(s.scope)].labels[end] = after;
  }

  void bind(const Statement& s, const std::vector<Variable>& formal,
            const std::vector<Operand>& passed, int base) {
    if (formal.size() != passed.size()) {
      throw PtxError(s.place.line, "call: expected " + std::to_string(formal.size()) +
                                       " parameters, got " + std::to_string(passed.size()));
    }
    for (size_t i = 0; i < formal.size(); ++i) {
      const Variable* v = variable(passed[i].name, s.scope);
      if (passed[i].kind != Operand::kName || v == nullptr || v->bytes != formal[i].bytes) {
        throw PtxError(s.place.line, "call: '" + passed[i].name + "' is no parameter of " +
                                         std::to_string(formal[i].bytes) + " bytes");
      }
      out_.scopes[static_cast<size_t>(base)].aliases[formal[i].name] = {s.scope, passed[i].name};
    }
  }

  // What calls pass is declared .param in a scope around them.
  const Variable* variable(const std::string& name, int scope) const {
    for (int at = scope; at >= 0; at = out_.scopes[static_cast<size_t>(at)].parent) {
      const Scope& s = out_.scopes[static_cast<size_t>(at)];
      const auto found = s.variables.find(name);
      if (found != s.variables.end() && found->second.space == Space::kParam) return &found->second;
    }
    return nullptr;
  }

  const Module& module_;
  Function out_;
  std::vector<const Function*> open_;
  int calls_ = 0;
};

}  // namespace

Function inline_calls(const Module& module, const Function& entry) {
  return Inliner(module, entry).take();
}

}  // namespace emulator
}  // namespace llmkern
