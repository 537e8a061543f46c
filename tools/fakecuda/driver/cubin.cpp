// Reads from a cubin, an ELF file, what a launch can be judged by: its architecture, and a kernel's parameters and
// registers. The attributes of a kernel are in .nv.info.<name>, its registers in .nv.info, by the symbol that
// .text.<name> names. The attributes' numbers are those that cuobjdump -elf shows.
#include <elf.h>

#include <cstring>

#include "state.h"

namespace fakecuda {
namespace {

constexpr unsigned char kFormatSized = 0x04;  // a 16-bit size and as many bytes follow; other formats hold 16 bits
constexpr unsigned char kParameter = 0x17;    // EIATTR_KPARAM_INFO
constexpr unsigned char kRegisters = 0x2f;    // EIATTR_REGCOUNT

const Elf64_Ehdr* elf_of(const void* image) {
  const auto* header = static_cast<const Elf64_Ehdr*>(image);
  const bool is_elf = memcmp(header->e_ident, ELFMAG, SELFMAG) == 0 && header->e_ident[EI_CLASS] == ELFCLASS64;
  return is_elf ? header : nullptr;
}

// Call visit(attribute, data, bytes) for each attribute that has data.
template <typename Visit>
void for_each_attribute(const unsigned char* data, size_t size, Visit visit) {
  for (size_t at = 0; at + 4 <= size;) {
    const unsigned char format = data[at], attribute = data[at + 1];
    uint16_t bytes;
    memcpy(&bytes, data + at + 2, sizeof bytes);
    at += 4;
    if (format != kFormatSized) continue;
    if (at + bytes <= size) visit(attribute, data + at, bytes);
    at += bytes;
  }
}

void read_parameters(const unsigned char* data, size_t size, KernelImage& kernel) {
  for_each_attribute(data, size, [&](unsigned char attribute, const unsigned char* value, uint16_t bytes) {
    if (attribute != kParameter || bytes < 12) return;
    uint16_t ordinal, offset;
    uint32_t packed;
    memcpy(&ordinal, value + 4, sizeof ordinal);
    memcpy(&offset, value + 6, sizeof offset);
    memcpy(&packed, value + 8, sizeof packed);
    if (kernel.parameters.size() <= ordinal) kernel.parameters.resize(ordinal + 1u);
    kernel.parameters[ordinal] = {offset, packed >> 18};
  });
}

unsigned registers_of(uint32_t symbol, const unsigned char* data, size_t size) {
  unsigned found = 0;
  for_each_attribute(data, size, [&](unsigned char attribute, const unsigned char* value, uint16_t bytes) {
    uint32_t pair[2];
    if (attribute != kRegisters || bytes < sizeof pair) return;
    memcpy(pair, value, sizeof pair);
    if (pair[0] == symbol) found = pair[1];
  });
  return found;
}

}  // namespace

int cubin_architecture(const void* image) {
  const Elf64_Ehdr* header = elf_of(image);
  if (!header) return 0;
  // Version 8 of the ABI moved the architecture up by a byte.
  return int((header->e_ident[EI_ABIVERSION] >= 8 ? header->e_flags >> 8 : header->e_flags) & 0xff);
}

KernelImage read_kernel(const void* image, const std::string& name) {
  KernelImage kernel;
  const Elf64_Ehdr* header = elf_of(image);
  if (!header) return kernel;
  const auto* base = static_cast<const unsigned char*>(image);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(base + header->e_shoff);
  const char* names = reinterpret_cast<const char*>(base + sections[header->e_shstrndx].sh_offset);
  const Elf64_Shdr *text = nullptr, *attributes = nullptr;
  for (unsigned i = 0; i < header->e_shnum; i++) {
    const std::string section = names + sections[i].sh_name;
    if (section == ".nv.info." + name) read_parameters(base + sections[i].sh_offset, sections[i].sh_size, kernel);
    if (section == ".text." + name) text = &sections[i];
    if (section == ".nv.info") attributes = &sections[i];
  }
  if (text && attributes) {
    const uint32_t symbol = text->sh_info & 0xffffff;  // older versions of the ABI have other things above
    kernel.registers = registers_of(symbol, base + attributes->sh_offset, attributes->sh_size);
  }
  return kernel;
}

}  // namespace fakecuda
