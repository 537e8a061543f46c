// Reads from a cubin, an ELF file, what a launch can be judged by: its architecture, and a kernel's parameters and
// registers. The attributes of a kernel are in .nv.info.<name>; their numbers are those that cuobjdump -elf shows.
#include <elf.h>

#include <cstring>

#include "state.h"

namespace fakecuda {
namespace {

constexpr unsigned char kFormatSized = 0x04;  // a 16-bit size and as many bytes follow; other formats hold 16 bits
constexpr unsigned char kParameter = 0x17;    // EIATTR_KPARAM_INFO

const Elf64_Ehdr* elf_of(const void* image) {
  const auto* header = static_cast<const Elf64_Ehdr*>(image);
  const bool is_elf = memcmp(header->e_ident, ELFMAG, SELFMAG) == 0 && header->e_ident[EI_CLASS] == ELFCLASS64;
  return is_elf ? header : nullptr;
}

void read_parameters(const unsigned char* data, size_t size, KernelImage& kernel) {
  for (size_t at = 0; at + 4 <= size;) {
    const unsigned char format = data[at], attribute = data[at + 1];
    uint16_t bytes;
    memcpy(&bytes, data + at + 2, sizeof bytes);
    at += 4;
    if (format != kFormatSized) continue;
    if (attribute == kParameter && bytes >= 12 && at + 12 <= size) {
      uint16_t ordinal, offset;
      uint32_t packed;
      memcpy(&ordinal, data + at + 4, sizeof ordinal);
      memcpy(&offset, data + at + 6, sizeof offset);
      memcpy(&packed, data + at + 8, sizeof packed);
      if (kernel.parameters.size() <= ordinal) kernel.parameters.resize(ordinal + 1u);
      kernel.parameters[ordinal] = {offset, packed >> 18};
    }
    at += bytes;
  }
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
  for (unsigned i = 0; i < header->e_shnum; i++) {
    const std::string section = names + sections[i].sh_name;
    if (section == ".nv.info." + name) read_parameters(base + sections[i].sh_offset, sections[i].sh_size, kernel);
    if (section == ".text." + name) kernel.registers = sections[i].sh_info >> 24;
  }
  return kernel;
}

}  // namespace fakecuda
