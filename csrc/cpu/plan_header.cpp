// The JSON of a safetensors header: objects of texts and of lists of whole numbers, and no more than that.
#include "plan_file.h"

namespace gatedconv {
namespace {

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  FileHeader header() {
    FileHeader header;
    object([&](const std::string& name) {
      if (name == "__metadata__") {
        object([&](const std::string& key) { add(header.metadata, key, text()); });
      } else {
        add(header.tensors, name, tensor());
      }
    });
    blanks();
    if (at_ != text_.size()) fail();
    return header;
  }

 private:
  [[noreturn]] static void fail() { throw FileError("the header is damaged"); }

  template <typename Map, typename Value>
  static void add(Map& map, const std::string& key, Value value) {
    if (!map.emplace(key, std::move(value)).second) fail();
  }

  TensorEntry tensor() {
    TensorEntry entry;
    object([&](const std::string& key) {
      if (key == "dtype" && entry.dtype.empty()) {
        entry.dtype = text();
      } else if (key == "shape" && entry.shape.empty()) {
        entry.shape = numbers();
      } else if (key == "data_offsets" && entry.offsets.empty()) {
        entry.offsets = numbers();
      } else {
        fail();
      }
    });
    return entry;
  }

  // Calls member(name) with the reader at the value of every member.
  template <typename Member>
  void object(Member member) {
    expect('{');
    if (accept('}')) return;
    do {
      const std::string name = text();
      expect(':');
      member(name);
    } while (accept(','));
    expect('}');
  }

  std::vector<int64_t> numbers() {
    std::vector<int64_t> values;
    expect('[');
    if (accept(']')) return values;
    do {
      values.push_back(number());
    } while (accept(','));
    expect(']');
    return values;
  }

  int64_t number() {
    blanks();
    const size_t begin = at_;
    int64_t value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      if (value > (int64_t{1} << 56)) fail();
      value = 10 * value + (text_[at_] - '0');
    }
    if (at_ == begin || (text_[begin] == '0' && at_ > begin + 1)) fail();
    return value;
  }

  std::string text() {
    expect('"');
    std::string value;
    for (char c; (c = next()) != '"';) {
      if (static_cast<unsigned char>(c) < 0x20) fail();
      if (c == '\\') {
        escape(value);
      } else {
        value += c;
      }
    }
    if (value.find('\0') != std::string::npos) fail();  // texts are handed out as C strings
    return value;
  }

  void escape(std::string& value) {
    static constexpr std::string_view names = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    const char c = next();
    if (c != 'u') {
      const size_t found = names.find(c);
      if (found == std::string_view::npos) fail();
      value += meanings[found];
      return;
    }
    uint32_t code = hex();
    if (code >= 0xd800 && code < 0xdc00) {  // the first half of a pair
      if (next() != '\\' || next() != 'u') fail();
      const uint32_t low = hex();
      if (low < 0xdc00 || low >= 0xe000) fail();
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xdc00 && code < 0xe000) {
      fail();
    }
    append_utf8(code, value);
  }

  static void append_utf8(uint32_t code, std::string& value) {
    const auto tail = [&](int shift) { value += static_cast<char>(0x80 | ((code >> shift) & 0x3f)); };
    if (code < 0x80) {
      value += static_cast<char>(code);
    } else if (code < 0x800) {
      value += static_cast<char>(0xc0 | (code >> 6));
      tail(0);
    } else if (code < 0x10000) {
      value += static_cast<char>(0xe0 | (code >> 12));
      tail(6), tail(0);
    } else {
      value += static_cast<char>(0xf0 | (code >> 18));
      tail(12), tail(6), tail(0);
    }
  }

  uint32_t hex() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = next();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail();
      code = code * 16 + static_cast<uint32_t>(digit);
    }
    return code;
  }

  void blanks() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos)
      ++at_;
  }
  bool accept(char wanted) {
    blanks();
    const bool found = at_ < text_.size() && text_[at_] == wanted;
    at_ += found;
    return found;
  }
  void expect(char wanted) {
    if (!accept(wanted)) fail();
  }
  char next() {
    if (at_ == text_.size()) fail();
    return text_[at_++];
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

FileHeader parse_header(std::string_view text) {
  return Parser(text).header();
}

}  // namespace gatedconv
