/* Under which sanitizer this is built: SANITIZED_ADDRESS, SANITIZED_THREAD, and SANITIZED for either, are 0
 * or 1. Sanitizers make everything slow and look at every access, so fewer cases will do. */
#ifndef SANITIZED_H
#define SANITIZED_H

#ifndef __has_feature
#define __has_feature(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#define SANITIZED_ADDRESS 1
#else
#define SANITIZED_ADDRESS 0
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
#define SANITIZED_THREAD 1
#else
#define SANITIZED_THREAD 0
#endif
#define SANITIZED (SANITIZED_ADDRESS || SANITIZED_THREAD)
/* Or for line coverage, whose counters threads share. */
#ifdef ULTRAEP_COVERAGE
#define SLOWED 1
#else
#define SLOWED SANITIZED
#endif

#endif
