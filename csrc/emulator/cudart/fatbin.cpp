// Fat binaries: a wrapper points at a header, which is followed by entries, each a header of its
// own and a payload: PTX text (kind 1) or an ELF cubin (kind 2). PTX may be stored as it is or
// compressed by LZ4 (block format); zstd, nvcc's default, is refused with the flag that avoids it.
#include <cstring>

#include "runtime.h"

namespace llmkern {
namespace cudart {
namespace {

struct Wrapper {
  uint32_t magic, version;
  const char* data;
  void* filename;
};

struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t payload_bytes;
};

struct Entry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t stored_bytes;
  uint32_t compressed_bytes, options_offset;
  uint16_t minor, major;
  uint32_t capability, name_offset, name_bytes;
  uint64_t flags, reserved, plain_bytes;
};
static_assert(sizeof(Entry) == 64, "as nvcc writes it");

constexpr uint32_t kWrapperMagic = 0x466243B1u, kHeaderMagic = 0xBA55ED50u;
constexpr uint64_t kLz4 = 0x2000, kZstd = 0x8000;
constexpr uint16_t kPtx = 1;

// A length that continues in bytes of 255. False: the input ends too early.
bool long_length(const unsigned char*& in, const unsigned char* end, size_t* length) {
  if (*length != 15) return true;
  unsigned char more = 255;
  while (more == 255) {
    if (in == end) return false;
    more = *in++;
    *length += more;
  }
  return true;
}

// LZ4 block format (github.com/lz4/lz4, doc/lz4_Block_format.md). False: broken input.
bool expand_lz4(const unsigned char* in, size_t bytes, size_t plain_bytes, std::string* out) {
  const unsigned char* end = in + bytes;
  out->clear();
  out->reserve(plain_bytes);
  while (in < end) {
    const unsigned char token = *in++;
    size_t literals = token >> 4, match = token & 15;
    if (!long_length(in, end, &literals) || literals > static_cast<size_t>(end - in)) return false;
    out->append(reinterpret_cast<const char*>(in), literals);
    in += literals;
    if (in == end) break;  // the last sequence has no match
    if (end - in < 2) return false;
    const size_t offset = in[0] | in[1] << 8;
    in += 2;
    if (!long_length(in, end, &match) || offset == 0 || offset > out->size()) return false;
    match += 4;
    if (out->size() + match > plain_bytes) return false;
    // Byte by byte: source and destination may overlap.
    for (size_t i = 0; i < match; ++i) out->push_back((*out)[out->size() - offset]);
  }
  return out->size() == plain_bytes;
}

// True where the entry is PTX that was read into `image`.
bool read_entry(const Entry& entry, const char* payload, Image* image, std::string* problem) {
  if (entry.kind != kPtx) return false;
  image->capability = static_cast<int>(entry.capability);
  if (entry.flags & kZstd) {
    *problem = "its PTX is compressed by zstd: build with nvcc --compress-mode=none";
    return false;
  }
  if (entry.flags & kLz4) {
    const auto* in = reinterpret_cast<const unsigned char*>(payload);
    if (expand_lz4(in, entry.compressed_bytes, entry.plain_bytes, &image->text)) return true;
    *problem = "its compressed PTX is broken";
    return false;
  }
  image->text.assign(payload, entry.stored_bytes);
  image->text.resize(std::strlen(image->text.c_str()));  // padded with zeros
  return true;
}

}  // namespace

std::vector<Image> read_fatbin(const void* wrapper, std::string* problem) {
  std::vector<Image> images;
  const auto* w = static_cast<const Wrapper*>(wrapper);
  if (w->magic != kWrapperMagic) {
    *problem = "it is no fat binary that this version knows";
    return images;
  }
  Header header;
  std::memcpy(&header, w->data, sizeof header);
  if (header.magic != kHeaderMagic) {
    *problem = "its header is unknown";
    return images;
  }
  const char* at = w->data + header.header_bytes;
  const char* end = at + header.payload_bytes;
  while (at + sizeof(Entry) <= end) {
    Entry entry;
    std::memcpy(&entry, at, sizeof entry);
    Image image;
    if (read_entry(entry, at + entry.header_bytes, &image, problem)) images.push_back(image);
    at += entry.header_bytes + entry.stored_bytes;
  }
  if (images.empty() && problem->empty()) {
    *problem = "it holds no PTX: build with -gencode arch=compute_80,code=compute_80";
  }
  return images;
}

}  // namespace cudart
}  // namespace llmkern
