#include "device_printf.h"

#include <cstring>

namespace llmkern {
namespace emulator {
namespace {

constexpr const char* kFlags = "-+ #0";
constexpr size_t kMostDigits = 4;  // of a width or a precision

class Formatter {
 public:
  Formatter(const std::function<void(uint64_t, int, void*)>& read,
            const std::function<std::string(uint64_t)>& text_at)
      : read_(read), text_at_(text_at) {}

  Printed run(const std::string& f) {
    for (size_t i = 0; i < f.size();) {
      if (f[i] != '%') {
        printed_.text += f[i++];
      } else if (i + 1 < f.size() && f[i + 1] == '%') {
        printed_.text += '%';
        i += 2;
      } else {
        i = conversion(f, i);
      }
    }
    return std::move(printed_);
  }

 private:
  template <class T>
  T next() {
    offset_ = (offset_ + sizeof(T) - 1) / sizeof(T) * sizeof(T);
    T value;
    read_(offset_, static_cast<int>(sizeof(T)), &value);
    offset_ += sizeof(T);
    ++printed_.arguments;
    return value;
  }

  // %[flags][width][.precision][length]conversion from f[begin]; returns where it ends.
  size_t conversion(const std::string& f, size_t begin) {
    size_t i = begin + 1;
    std::string spec = "%";
    while (i < f.size() && std::strchr(kFlags, f[i]) != nullptr) spec += f[i++];
    i = number(f, i, &spec);
    if (i < f.size() && f[i] == '.') {
      spec += f[i++];
      i = number(f, i, &spec);
    }
    bool wide = false;
    for (; i < f.size() && std::strchr("hljztL", f[i]) != nullptr; ++i) wide = wide || f[i] != 'h';
    const char kind = i < f.size() ? f[i] : '\0';
    if (kind != '\0' && std::strchr("diouxXc", kind) != nullptr) {
      integer(spec, kind, wide);
    } else if (kind != '\0' && std::strchr("eEfFgGaA", kind) != nullptr) {
      show((spec + kind).c_str(), next<double>());
    } else if (kind == 'p') {
      show((spec + kind).c_str(), reinterpret_cast<void*>(next<uint64_t>()));
    } else if (kind == 's') {
      show((spec + kind).c_str(), text_at_(next<uint64_t>()).c_str());
    } else {  // as CUDA does, what is not known is shown as it stands
      printed_.text += f.substr(begin, i - begin + 1);
    }
    return i + 1;
  }

  size_t number(const std::string& f, size_t i, std::string* spec) {
    if (i < f.size() && f[i] == '*') {
      *spec += std::to_string(next<int32_t>() % 10000);
      return i + 1;
    }
    const size_t first = i;
    while (i < f.size() && f[i] >= '0' && f[i] <= '9') ++i;
    *spec += f.substr(first, std::min(i - first, kMostDigits));
    return i;
  }

  void integer(const std::string& spec, char kind, bool wide) {
    if (wide && kind != 'c') return show((spec + "ll" + kind).c_str(), next<long long>());
    show((spec + kind).c_str(), next<int32_t>());
  }

  template <class T>
  void show(const char* spec, T value) {
    const int length = std::snprintf(nullptr, 0, spec, value);
    if (length <= 0) return;
    std::string text(static_cast<size_t>(length) + 1, '\0');
    std::snprintf(&text[0], text.size(), spec, value);
    text.pop_back();
    printed_.text += text;
  }

  const std::function<void(uint64_t, int, void*)>& read_;
  const std::function<std::string(uint64_t)>& text_at_;
  uint64_t offset_ = 0;
  Printed printed_;
};

}  // namespace

Printed format_text(const std::string& format,
                    const std::function<void(uint64_t, int, void*)>& read,
                    const std::function<std::string(uint64_t)>& text_at) {
  return Formatter(read, text_at).run(format);
}

void read_print_argument(Warp& w, int lane, uint64_t address, int bytes, void* to) {
  const auto size = static_cast<uint64_t>(bytes);
  const auto end = static_cast<uint64_t>(w.launch->kernel->local_bytes);
  const uint64_t inside = address & ~kWindowMask;
  if ((address & kWindowMask) == kLocalWindow && inside + size <= end) {
    std::memcpy(to, w.local + static_cast<uint64_t>(lane) * end + inside, size);
  } else if (w.launch->registry.find(address, size) != nullptr) {
    std::memcpy(to, reinterpret_cast<const void*>(address), size);
  } else {
    throw Fault{"out of bounds", "printf reads an argument where there is none", lane, -1};
  }
}

}  // namespace emulator
}  // namespace llmkern
