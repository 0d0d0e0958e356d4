// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// exchanges is an Exchange request with all that the timed loop needs.
type exchanges struct {
	request Request
	targets []sockaddr
	order   []uint32
	kept    []int // the socket of each target with Request.Kept, else -1
	timeout unix.Timeval
	reply   Reply
}

// exchange sends and waits for answers.
func exchange(ctx context.Context, request Request) (Reply, error) {
	e := &exchanges{
		request: request, targets: make([]sockaddr, len(request.Addresses)), kept: make([]int, len(request.Addresses)),
		order:   order(request.Seed, 1, len(request.Addresses), request.Warmup+request.Count),
		timeout: unix.NsecToTimeval(max(request.Timeout, time.Microsecond).Nanoseconds()),
	}
	for i, a := range request.Addresses {
		e.targets[i], e.kept[i] = newSockaddr(a), -1
	}
	e.reply.Latencies = make([]int64, 0, request.Count)
	defer func() {
		for _, socket := range e.kept {
			if socket >= 0 {
				unix.Close(socket)
			}
		}
	}()
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	err := onThread(func() error { return e.loop(ctx) })
	return e.reply, err
}

func (e *exchanges) loop(ctx context.Context) error {
	if e.request.Alone {
		if err := alone(); err != nil {
			return err
		}
	}
	e.reply.Began = time.Now()
	for i, target := range e.order {
		if e.request.Limit > 0 && time.Since(e.reply.Began) >= e.request.Limit || ctx.Err() != nil {
			e.reply.Unsent = int64(len(e.order) - i)
			break
		}
		socket, err := e.socket(target)
		if err != nil {
			return err
		}
		took, errno := e.once(socket, &e.targets[target], i)
		if !e.request.Kept {
			unix.Close(socket)
		}
		switch {
		case errno != 0:
			e.reply.count(errnoName(errno))
		case i >= e.request.Warmup:
			e.reply.Latencies = append(e.reply.Latencies, took)
		}
	}
	e.reply.Elapsed = time.Since(e.reply.Began)
	return ctx.Err()
}

// socket is a target's own with Request.Kept, which has exchanged something already, and else a new one.
func (e *exchanges) socket(target uint32) (int, error) {
	if e.kept[target] >= 0 {
		return e.kept[target], nil
	}
	kind := unix.SOCK_DGRAM
	if e.request.Stream {
		kind = unix.SOCK_STREAM
	}
	address := &e.targets[target]
	socket, err := unix.Socket(address.family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("create socket: %w", err)
	}
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, option, &e.timeout); err != nil {
			unix.Close(socket)
			return -1, fmt.Errorf("set a socket's timeout: %w", err)
		}
	}
	if !e.request.Kept {
		return socket, nil
	}
	e.kept[target] = socket
	if e.request.Stream {
		if _, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(socket), uintptr(unsafe.Pointer(&address.raw)), uintptr(address.size)); errno != 0 {
			return -1, fmt.Errorf("connect to %s: %w", e.request.Addresses[target], errno)
		}
		if err := unix.SetsockoptLinger(socket, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return -1, fmt.Errorf("set SO_LINGER: %w", err)
		}
		if _, err := unix.Read(socket, make([]byte, maxDatagram)); err != nil { // the server's name
			return -1, fmt.Errorf("read from %s: %w", e.request.Addresses[target], err)
		}
		return socket, nil
	}
	_, errno := e.once(socket, address, -1)
	if errno != 0 {
		return -1, fmt.Errorf("ask %s: %w", e.request.Addresses[target], errno)
	}
	return socket, nil
}

// once sends a line and waits for the answer. took is from the call that sends to the answer, or with Request.OneWay to the call's return.
func (e *exchanges) once(socket int, to *sockaddr, operation int) (took int64, errno syscall.Errno) {
	question := append(strconv.AppendInt(nil, int64(operation), 10), '\n')
	var answer [maxDatagram]byte
	start := time.Now()
	if e.request.Stream {
		_, _, errno = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(socket), uintptr(unsafe.Pointer(&question[0])), uintptr(len(question)), unix.MSG_NOSIGNAL, 0, 0)
	} else {
		_, _, errno = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(socket), uintptr(unsafe.Pointer(&question[0])), uintptr(len(question)), 0, uintptr(unsafe.Pointer(&to.raw)), uintptr(to.size))
	}
	sent := time.Since(start)
	if errno != 0 {
		return 0, errno
	}
	_, _, errno = unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(socket), uintptr(unsafe.Pointer(&answer[0])), uintptr(len(answer)), 0, 0, 0)
	if errno == unix.EAGAIN {
		errno = unix.ETIMEDOUT
	}
	if e.request.OneWay {
		return int64(sent), errno
	}
	return int64(time.Since(start)), errno
}
