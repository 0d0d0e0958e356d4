// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"
)

// identify asks the addresses which server answers, by TCP or by UDP, one after the other.
func identify(ctx context.Context, request Request) (Reply, error) {
	network, ask := "tcp", readName
	if request.Kind == Datagram {
		network, ask = "udp", exchangeName
	}
	reply := Reply{Answered: map[string]int64{}, Began: time.Now()}
	cpu := processCPU()
	indices := order(request.Seed, 1, len(request.Addresses), request.Count)
	for i, target := range indices {
		if request.Limit > 0 && time.Since(reply.Began) >= request.Limit || ctx.Err() != nil {
			reply.Unsent = int64(len(indices) - i)
			break
		}
		called := time.Now()
		name, err := answer(ctx, network, request.Addresses[target], request.Timeout, ask, i)
		if err != nil {
			reply.count(errorName(err))
			continue
		}
		reply.Latencies = append(reply.Latencies, int64(time.Since(called)))
		reply.Answered[name]++
	}
	reply.Elapsed = time.Since(reply.Began)
	reply.CPU = processCPU() - cpu
	return reply, ctx.Err()
}

// answer connects, asks and closes, all within timeout.
func answer(ctx context.Context, network string, address netip.AddrPort, timeout time.Duration,
	ask func(net.Conn, int) (string, error), operation int) (string, error) {
	deadline := time.Now().Add(timeout)
	dialer := net.Dialer{Deadline: deadline}
	c, err := dialer.DialContext(ctx, network, address.String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	if tcp, ok := c.(*net.TCPConn); ok {
		if err := tcp.SetLinger(0); err != nil { // close by RST, as every client here does
			return "", err
		}
	}
	if err := c.SetDeadline(deadline); err != nil {
		return "", err
	}
	return ask(c, operation)
}

// readName reads the line by which a server names itself.
func readName(c net.Conn, _ int) (string, error) {
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return "", err
	}
	return strings.TrimSuffix(line, "\n"), nil
}

// exchangeName sends the operation's number and waits for the reply that repeats it below the server's name.
func exchangeName(c net.Conn, operation int) (string, error) {
	question := fmt.Sprintf("%d", operation)
	if _, err := io.WriteString(c, question); err != nil {
		return "", err
	}
	buffer := make([]byte, maxDatagram)
	for {
		n, err := c.Read(buffer)
		if err != nil {
			return "", err
		}
		if name, echo, ok := strings.Cut(string(buffer[:n]), "\n"); ok && echo == question {
			return name, nil
		}
	}
}

// errorName returns the key of Reply.Errors for an error of package net.
func errorName(err error) string {
	var errno syscall.Errno
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return timedOut
	case errors.As(err, &errno):
		return errnoName(errno)
	case errors.Is(err, io.EOF):
		return "EOF"
	}
	var network net.Error
	if errors.As(err, &network) && network.Timeout() {
		return timedOut
	}
	return err.Error()
}
