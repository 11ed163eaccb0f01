// What the checks found.
#pragma once

#include <csignal>
#include <string>

#include "ratios.h"

namespace kernel_check {

// The check that runs now, for a signal's message: memory beside a tensor that is touched ends the program.
inline char (&current())[200] {
  static char text[200];
  return text;
}
inline void report_signal(int number) {
  const char* parts[] = {"kernel_check: memory beside a tensor was touched, or another crash, in: ", current(), "\n"};
  for (const char* part : parts)
    if (write(2, part, std::strlen(part)) < 0) break;
  std::signal(number, SIG_DFL);
  std::raise(number);
}

struct Failed {};

struct Report {
  bool stops = false;  // at the first failure, by throwing Failed: for runs with a fault, which are meant to fail
  int checks = 0, failures = 0, failures_before = 0;
  Figures worst;  // ratios, since the last summary

  void begin(const std::string& label) { std::snprintf(current(), sizeof(current()), "%s", label.c_str()); }
  // `wrong` is empty, or what is wrong.
  void add(const std::string& label, const std::string& wrong) {
    ++checks;
    if (wrong.empty()) return;
    if (stops) throw Failed{};
    ++failures;
    std::printf("FAILED %s:%s\n", label.c_str(), wrong.c_str());
  }
  void add(const std::string& label, const Figures& found, DType dtype) {
    worst.max = std::max(worst.max, found.max);
    worst.rms = std::max(worst.rms, found.rms);
    worst.channel = std::max(worst.channel, found.channel);
    worst.position = std::max(worst.position, found.position);
    add(label, exceeded(found, dtype));
  }
  void summary(const char* set, const char* what) {
    std::printf("%s: %s: %d checks, %d failed", set, what, checks, failures - failures_before);
    if (worst.rms > 0)
      std::printf("; error over eager's at most: max %.2fx, rms %.2fx, channel %.2fx, position %.2fx", worst.max,
                  worst.rms, worst.channel, worst.position);
    std::printf("\n");
    std::fflush(stdout);
    checks = 0;
    failures_before = failures;
    worst = {};
  }
};

}  // namespace kernel_check
