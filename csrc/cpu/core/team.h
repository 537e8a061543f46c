// Threads that share the phases of a job piece by piece, so that no thread waits for one that the system has suspended.
//
// A job is a sequence of phases, and a phase is a number of pieces. Every thread of the job walks through all phases
// and claims pieces while any are left. A thread begins with its own share, from the first piece to the last, so that
// it reads memory from one end to the other. Then it takes pieces of the other shares. Each piece is computed into
// memory that belongs to the thread alone, and exactly one thread commits it to shared memory. A thread that finds no
// piece left waits for a while, and then computes the missing pieces too. The first thread to finish a piece commits
// it, and the second one drops its result. So a suspended thread delays its job only while it commits. A thread that
// comes late skips the phases that are over.
//
// A later phase may overwrite the input of a piece whose thread was suspended. The result of that thread is then
// dropped. The input has to stay allocated until the thread has left the job, which `Running::finish` waits for.
#pragma once

#if __has_include(<pthread.h>)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace gpt_fast {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns how many CPUs the process may use: the CPUs of its affinity mask, limited by the quota of its control group.
inline int usable_cpus() {
  int count = static_cast<int>(std::thread::hardware_concurrency());  // 0 if the number is not known
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
#endif
  double quota = -1.0, period = -1.0;
  std::ifstream unified("/sys/fs/cgroup/cpu.max");  // "max 100000" without a quota; "max" does not read as a number
  if (unified >> quota >> period) {
  } else {
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;  // -1 without a quota
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  if (quota > 0.0 && period > 0.0) count = std::min(count, static_cast<int>(quota / period + 0.999));
  return std::max(count, 1);
}

constexpr int64_t kPartsOfThread = 4;  // parts of a loop for each thread

class Team {
  using Clock = std::chrono::steady_clock;

 public:
  class Walker;
  using Job = std::function<void(Walker&)>;
  static constexpr int64_t kMostPieces = 4096;  // pieces that threads share at a time

  // One thread's progress through the phases of a job.
  class Walker {
   public:
    // Computes and commits the pieces 0 to `pieces` together with the other threads of the job. Returns when all pieces
    // are committed. Every thread must call it with the same number.
    template <class Compute, class Commit>
    void phase(int64_t pieces, const Compute& compute, const Commit& commit) {
      if (team_ == nullptr) {
        for (int64_t piece = 0; piece < pieces; ++piece) {
          compute(piece);
          commit(piece);
        }
        return;
      }
      for (int64_t begin = 0; begin < pieces; begin += kMostPieces) {
        share_pieces(
            std::min(kMostPieces, pieces - begin), [&](int64_t piece) { compute(begin + piece); },
            [&](int64_t piece) { commit(begin + piece); });
      }
    }

   private:
    friend class Team;
    Walker(Team* team, uint64_t id, int share, int shares) : team_(team), id_(id), share_(share), shares_(shares) {}

    template <class Compute, class Commit>
    void share_pieces(int64_t pieces, const Compute& compute, const Commit& commit) {
      const uint64_t id = id_++;
      auto began = Clock::now();
      auto last = Clock::duration::zero();
      for (int64_t piece; (piece = team_->claim(id, share_, shares_, pieces)) >= 0;) {
        compute(piece);
        if (team_->begin_commit(id, piece)) {
          commit(piece);
          team_->end_commit(id, piece);
        }
        const auto now = Clock::now();
        last = now - began;
        began = now;
      }
      const auto patience = 2 * last + kPatience;
      int64_t turn = 0, committed = 0;
      while (!team_->finish_phase(id, committed, pieces)) {
        pause_briefly();
        if (++turn % 64 != 0 || Clock::now() - began < patience) continue;
        for (int64_t piece = pieces - 1; piece >= committed && !team_->is_over(id); --piece) {
          if (team_->is_committing(id, piece)) continue;
          compute(piece);
          if (team_->begin_commit(id, piece)) {
            commit(piece);
            team_->end_commit(id, piece);
          }
        }
        began = Clock::now();
      }
    }

    Team* const team_;  // null: the thread is alone
    uint64_t id_;       // number of the next phase
    const int share_, shares_;
  };

  // Handle of a job that other threads may still run.
  class Running {
   public:
    // Returns true if no other thread runs the job. After a fork this is true, because the child has no threads of the
    // parent.
    bool is_over() const { return job_.use_count() <= 1 || team_ != &instance(); }

    void finish() const {
      while (!is_over()) std::this_thread::yield();
      std::atomic_thread_fence(std::memory_order_acquire);
    }

   private:
    friend class Team;
    Running() = default;
    Running(const Team* team, std::shared_ptr<const Job> job) : team_(team), job_(std::move(job)) {}
    const Team* team_ = nullptr;
    std::shared_ptr<const Job> job_;
  };

  // Returns the team of the process. After a fork the child makes a new team, because it has none of the threads.
  static Team& instance() {
    static Team* team = new Team;  // never destroyed: its threads may outlive static objects
#if __has_include(<pthread.h>)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked() = true; });
    (void)registered;
#endif
    if (forked().exchange(false)) team = new Team;
    return *team;
  }

  // Runs the job on this thread and up to `threads` - 1 others. A team serves one job at a time: a second caller runs
  // its job alone. Returns a handle, whose `finish` waits until no other thread runs the job.
  Running run(int threads, Job given) {
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (threads <= 1 || !turn.try_lock()) {
      Walker alone(nullptr, 0, 0, 1);
      given(alone);
      return {};
    }
    auto job = std::make_shared<const Job>(std::move(given));
    threads = std::min(threads, kMostThreads);
    const uint64_t first = phase_.load(std::memory_order_acquire);
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      job_ = job;
      first_ = first;
      threads_ = threads;
      try {
        for (; threads_started_ < threads - 1; ++threads_started_) {
          std::thread([this, number = threads_started_ + 1] { serve(number); }).detach();
        }
      } catch (const std::system_error&) {  // the system has no more threads: the started ones serve
      }
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load(std::memory_order_seq_cst) > 0) woken_.notify_all();
    Walker walker(this, first, 0, threads);
    (*job)(walker);
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      job_ = nullptr;
    }
    return {this, job};
  }

 private:
  static constexpr int kPieceBits = 16;
  static constexpr int kMostThreads = 256;
  static constexpr auto kPatience = std::chrono::microseconds(30);
  static constexpr auto kAwake = std::chrono::microseconds(300);  // how long a thread spins for the next job
  enum : uint64_t { kCommitting = 1, kCommitted = 2 };

  Team() : tickets_(kMostThreads), states_(kMostPieces) {}

  static std::atomic<bool>& forked() {
    static std::atomic<bool> flag{false};
    return flag;
  }

  // Claims a piece of phase `id` and returns it, or -1 if none is left. The thread's own share comes first, then the
  // shares after it.
  int64_t claim(uint64_t id, int share, int shares, int64_t pieces) {
    for (int i = 0; i < shares; ++i) {
      const int from = (share + i) % shares;
      const int64_t begin = from * pieces / shares, end = (from + 1) * pieces / shares;
      std::atomic<uint64_t>& ticket = tickets_[from].value;
      uint64_t seen = ticket.load(std::memory_order_acquire);
      while (begin < end) {
        const uint64_t phase = seen >> kPieceBits;
        const int64_t next = phase == id ? static_cast<int64_t>(seen & ((1u << kPieceBits) - 1)) : begin;
        if (phase > id || next >= end) break;  // the share has no piece left, or a later phase has begun
        if (ticket.compare_exchange_weak(seen, id << kPieceBits | static_cast<uint64_t>(next + 1),
                                         std::memory_order_acq_rel)) {
          return next;
        }
      }
      if (is_over(id)) return -1;
    }
    return -1;
  }

  bool is_over(uint64_t id) const { return phase_.load(std::memory_order_acquire) != id; }

  bool is_committing(uint64_t id, int64_t piece) const {
    return states_[piece].load(std::memory_order_relaxed) >= (id << 2 | kCommitting);
  }

  // Returns true if the calling thread commits the piece. States only grow, so no thread can begin a commit of an
  // earlier phase, whose pieces were all committed.
  bool begin_commit(uint64_t id, int64_t piece) {
    uint64_t state = states_[piece].load(std::memory_order_acquire);
    return state < (id << 2 | kCommitting) &&
           states_[piece].compare_exchange_strong(state, id << 2 | kCommitting, std::memory_order_acq_rel);
  }

  void end_commit(uint64_t id, int64_t piece) { states_[piece].store(id << 2 | kCommitted, std::memory_order_release); }

  // Returns true if the phase is over. `committed` counts the first pieces that this thread has seen committed. A
  // thread that has seen all of them committed ends the phase.
  bool finish_phase(uint64_t id, int64_t& committed, int64_t pieces) {
    while (committed < pieces && states_[committed].load(std::memory_order_acquire) == (id << 2 | kCommitted)) {
      ++committed;
    }
    if (committed == pieces) phase_.compare_exchange_strong(id, id + 1, std::memory_order_acq_rel);
    return committed == pieces || is_over(id);
  }

  void serve(int number) {
    uint64_t seen = 0;
    while (true) {
      const auto began = Clock::now();
      for (int64_t turn = 1; generation_.load(std::memory_order_acquire) == seen; ++turn) {
        pause_briefly();
        if (turn % 64 != 0 || Clock::now() - began < kAwake) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        // Not wait(): with GCC 12 it needs a symbol of libstdc++ 3.4.30, which RHEL 9 and Amazon Linux 2023 lack.
        woken_.wait_for(lock, std::chrono::hours(24),
                        [&] { return generation_.load(std::memory_order_acquire) != seen; });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
      std::shared_ptr<const Job> job;
      uint64_t first = 0;
      int threads = 0;
      {
        const std::lock_guard<std::mutex> guard(mutex_);
        seen = generation_.load(std::memory_order_acquire);
        threads = threads_;
        if (number < threads) job = job_;
        first = first_;
      }
      if (job == nullptr) continue;
      Walker walker(this, first, number, threads);
      (*job)(walker);
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable woken_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> sleeping_{0};
  std::shared_ptr<const Job> job_;  // mutex_ guards this member and the next three
  uint64_t first_ = 0;
  int threads_ = 0, threads_started_ = 0;  // threads of the job with its caller; threads started to serve

  struct alignas(64) Ticket {
    std::atomic<uint64_t> value{0};  // number of a phase, and the next piece of one of its shares
  };
  alignas(64) std::atomic<uint64_t> phase_{1};
  std::vector<Ticket> tickets_;                // one for each share
  std::vector<std::atomic<uint64_t>> states_;  // of each piece: number of a phase, and kCommitting or kCommitted
};

// Calls body(first, last) for parts of `begin` to `end`, each of at least `grain`, on the threads that PyTorch may use.
// Threads claim one part after another, so a thread that the system has suspended delays only its current part.
template <class Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  static const int usable = usable_cpus();
  const int64_t n = end - begin, most = n <= 0 ? 0 : (n + grain - 1) / std::max<int64_t>(grain, 1);
  const int threads = static_cast<int>(std::min<int64_t>(most, std::min(at::get_num_threads(), usable)));
  if (threads <= 1 || at::in_parallel_region()) {
    if (n > 0) body(begin, end);
    return;
  }
  const int64_t parts = std::min<int64_t>(most, kPartsOfThread * threads);
  struct Failure {
    std::mutex mutex;
    std::exception_ptr first;
  };
  const auto failure = std::make_shared<Failure>();
  const Body* const work = &body;  // a thread that comes late gets no part, so it never reads `body`
  Team::instance().run(threads, [=](Team::Walker& walker) {
    walker.phase(
        parts, [](int64_t) {},
        [=](int64_t part) {
          try {
            (*work)(begin + part * n / parts, begin + (part + 1) * n / parts);
          } catch (...) {
            const std::lock_guard<std::mutex> guard(failure->mutex);
            if (failure->first == nullptr) failure->first = std::current_exception();
          }
        });
  });
  if (failure->first != nullptr) std::rethrow_exception(failure->first);
}

}  // namespace gpt_fast
